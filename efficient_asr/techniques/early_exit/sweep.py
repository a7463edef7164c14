"""Evaluate many exit thresholds from one inference run of a trained early-exit model.

Every utterance is run once, to full depth, and the score of each rule at each head is recorded. For any threshold, the exit
layer, the transcript and the MACs of each utterance then follow exactly, without running the model again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from efficient_asr.data import iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.macs import count_macs, thop_available
from efficient_asr.evaluation.records import Records
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.wer import count_errors
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.techniques.early_exit.heads import NEVER, RULES, ExitHeads, exits
from efficient_asr.utils.errors import UserError

CALIBRATIONS = ("mean_layer", "wer_loss_percent")  # calibration targets
MOST_CANDIDATES = 1000  # upper limit on the thresholds that calibration tries


@dataclass
class Sweep:
    """Results of one inference run to full depth.

    Attributes
    ----------
    layers : list of int
        The heads' layers.
    references : list of str
        Normalised references, [utterances].
    hypotheses : list of list of str
        Normalised hypotheses of each head, [utterances][heads].
    errors : numpy.ndarray
        Word errors, [utterances, heads].
    words : int
        Reference words.
    scores : dict of str to numpy.ndarray
        Scores of each rule, [utterances, heads].
    encoder_macs, head_macs : numpy.ndarray
        MACs of everything up to a head's layer, and of the head, by our rules and by thop's, [utterances, heads, 2].
    """

    layers: list[int]
    references: list[str]
    hypotheses: list[list[str]]
    errors: np.ndarray
    words: int
    scores: dict[str, np.ndarray]
    encoder_macs: np.ndarray
    head_macs: np.ndarray

    def exits(self, rule: str, threshold: float, patience: int = 1) -> np.ndarray:
        """Index of the head where each utterance exits, [utterances]."""
        return exits(rule, self.scores[rule], threshold, patience)

    def macs(self, rule: str, out: np.ndarray) -> np.ndarray:
        """MACs of utterances that exit at heads `out` [utterances], by our rules and by thop's, [utterances, 2]."""
        rows = np.arange(len(out))
        # Similarity uses hidden states only; the other rules compute every head up to the exit.
        heads = self.head_macs if rule in ("none", "similarity") else self.head_macs.cumsum(axis=1)
        return self.encoder_macs[rows, out] + heads[rows, out]

    def wer_percent(self, out: np.ndarray | int) -> float:
        """WER in percent if utterances exit at heads `out`."""
        return 100 * float(self.errors[np.arange(len(self.errors)), out].sum()) / max(1, self.words)

    def mean_layer(self, out: np.ndarray) -> float:
        """Mean exit layer if utterances exit at heads `out`."""
        return float(np.asarray(self.layers)[out].mean())

    def details(self, out: np.ndarray) -> dict[str, Any]:
        """Mean and histogram of the exit layer, and the WER of each head alone."""
        counts = np.bincount(out, minlength=len(self.layers)).tolist()
        return {
            "mean_exit_layer": self.mean_layer(out),
            "exit_layers": dict(zip(map(str, self.layers), counts, strict=True)),
            "wer_percent_of_heads": {str(layer): self.wer_percent(i) for i, layer in enumerate(self.layers)},
        }

    def choose_threshold(
        self, rule: str, mean_layer: float | None = None, wer_loss_percent: float | None = None, patience: int = 1
    ) -> float:
        """Calibrate the threshold: closest to a mean exit layer, or the earliest exits within a WER loss.

        Arguments
        ---------
        rule : str
            The rule.
        mean_layer : float, optional
            Target mean exit layer.
        wer_loss_percent : float, optional
            Maximum WER increase over full depth, in percentage points.
        patience : int
            Consecutive heads that must meet the threshold.

        Raises
        ------
        UserError
            If not exactly one of the two targets is given, or the rule has no threshold.
        """
        if (mean_layer is None) == (wer_loss_percent is None):
            raise UserError("give exactly one calibration target: a mean exit layer or a WER loss")
        if rule == "none":
            raise UserError("exit_rule: 'none' has no threshold to calibrate; choose another rule")
        values = np.unique(self.scores[rule][:, :-1])
        values = values[np.isfinite(values)]
        if not len(values):
            raise UserError(
                f"exit_layers: {len(self.layers)} heads give {rule} no score before the last layer; there is nothing to calibrate"
            )
        candidates = np.concatenate([values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-6])
        if len(candidates) > MOST_CANDIDATES:
            candidates = np.quantile(candidates, np.linspace(0, 1, MOST_CANDIDATES))
        full = self.wer_percent(-1)
        best, best_value = NEVER[rule], np.inf
        for threshold in [NEVER[rule], *candidates.tolist()]:
            out = self.exits(rule, threshold, patience)
            if mean_layer is not None:
                value = abs(self.mean_layer(out) - mean_layer)
            else:
                value = self.mean_layer(out) if self.wer_percent(out) - full <= wer_loss_percent else np.inf
            if value < best_value:
                best, best_value = threshold, value
        return best

    def records(self, benchmark: Benchmark, rule: str, out: np.ndarray) -> Records:
        """Return the records that `score` would give with exits at heads `out` [utterances]."""
        records, macs = Records(), self.macs(rule, out)
        for i, row in enumerate(benchmark.rows):
            records.append(
                {
                    "id": row["id"], "duration": row["duration"], "reference": self.references[i],
                    "hypothesis": self.hypotheses[i][out[i]], "errors": int(self.errors[i, out[i]]),
                    "macs_g": macs[i, 0] / 1e9, "macs_thop_g": macs[i, 1] / 1e9 if thop_available() else None,
                    "exit_layer": self.layers[out[i]],
                }
            )  # fmt: skip
        return records


def sweep(model: CTCModel, benchmark: Benchmark, macs: bool = True) -> Sweep:
    """Run every utterance once, to full depth.

    Arguments
    ---------
    model : CTCModel
        Model with exit heads, in evaluation mode.
    benchmark : Benchmark
        The utterances to run.
    macs : bool
        Whether to count MACs.

    Raises
    ------
    UserError
        If the model has no exit heads.
    """
    heads = exit_heads(model)
    device = next(model.parameters()).device

    def run(fn: Any, *args: Any) -> tuple[Any, np.ndarray]:
        if not macs:
            return fn(*args), np.zeros(2)
        counted = count_macs(fn, *args)
        return counted.output, np.array([counted.macs, counted.macs_thop or 0], dtype=float)

    references, hypotheses, errors, scores, costs, words = [], [], [], [], [], 0
    progress = tqdm(
        iterate_batches(benchmark.rows, 1), total=len(benchmark.rows), unit="utt", leave=False, mininterval=1
    )
    for (row,), wavs, wav_lens in progress:
        with torch.no_grad():
            (short, lengths), front_macs = run(model.apply_frontend, wavs.to(device), wav_lens.to(device))
            found = heads.trace(model.encoder, short, lengths, run)
        texts = [benchmark.normalise(model.labels.decode(one["labels"]), row) for one in found]
        reference = benchmark.normalise(row["text"], row)
        counted = count_errors([reference] * len(texts), texts)
        words += counted[0].reference_length
        references.append(reference)
        hypotheses.append(texts)
        errors.append([e.total for e in counted])
        scores.append([[one[rule] for rule in RULES] for one in found])
        costs.append([[one["encoder_cost"] + front_macs, one["head_cost"]] for one in found])
    all_scores, all_costs = np.array(scores), np.array(costs)
    return Sweep(
        heads.layers,
        references,
        hypotheses,
        np.array(errors),
        words,
        {rule: all_scores[:, :, i] for i, rule in enumerate(RULES)},
        all_costs[:, :, 0],
        all_costs[:, :, 1],
    )


def plot_group(result: Result) -> str:
    """Return the suffix of the technique's name in plot legends; each rule has its own colour."""
    rule = result.details.get("exit_rule")
    return {None: "", "none": ", full depth"}.get(rule, f", {rule}")


def exit_heads(model: Any) -> ExitHeads:
    """Return a model's exit heads.

    Raises
    ------
    UserError
        If the model has none.
    """
    heads = model.head if isinstance(model, CTCModel) else None
    if not isinstance(heads, ExitHeads):
        raise UserError("this model has no exit heads; train one with recipes/early_exit/train.py")
    return heads


def exit_layers_of(hparams: dict[str, Any], encoder: Encoder) -> list[int]:
    """Return the layers with a head, by default the upper half, and reject settings that would waste a training run.

    Raises
    ------
    UserError
        If a setting is invalid, naming the key.
    """
    for key in ("exit_layers", "exit_loss_weights"):
        value = hparams[key]
        if value is not None and not (
            isinstance(value, list) and all(type(i) in (int, float) and i >= 0 for i in value)
        ):
            raise UserError(f"{key}: expected a list of numbers, got {value!r}")
    if hparams["exit_training"] not in ("joint", "two_step"):
        raise UserError(f"exit_training: expected joint or two_step, got '{hparams['exit_training']}'")
    first, epochs = hparams["first_step_epochs"], hparams["number_of_epochs"]
    if hparams["exit_training"] == "two_step" and first >= epochs:
        raise UserError(
            f"first_step_epochs: {first} of {epochs} epochs (number_of_epochs) leave no epochs for the second step"
        )
    wanted = [key for key in CALIBRATIONS if hparams[f"calibrate_{key}"] is not None]
    if len(wanted) > 1 or (wanted and hparams["exit_threshold"] is not None):
        raise UserError(
            "give only one of exit_threshold, calibrate_mean_layer and calibrate_wer_loss_percent; keep the others null"
        )
    if wanted and hparams["exit_rule"] == "none":
        raise UserError(f"calibrate_{wanted[0]}: exit_rule 'none' has no threshold to calibrate; choose another rule")
    if encoder.layerdrop:
        raise UserError(f"train_layerdrop: {encoder.layerdrop} skips layers whose heads are trained; set it to 0.0")
    layers = hparams["exit_layers"] or list(range(encoder.num_layers // 2 + 1, encoder.num_layers + 1))
    weights = hparams["exit_loss_weights"]
    if weights is not None and len(weights) != len(layers):
        raise UserError(
            f"exit_loss_weights: expected {len(layers)} weights, one for each of exit_layers {layers}, "
            f"got {list(weights)}"
        )
    return layers
