"""Many exit thresholds from one pass over a trained early-exit model.

Every utterance is computed once, to full depth, and what each rule sees at each head is kept as a few numbers. Where an
utterance would leave at a threshold, what it would say, and how many MACs it would have taken all follow from that, exactly.
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

CALIBRATIONS = ("mean_layer", "wer_loss_percent")  # what a threshold can be calibrated for
MOST_CANDIDATES = 1000  # thresholds that calibration tries


@dataclass
class Sweep:
    """What one pass found.

    Attributes
    ----------
    layers : list of int
        The heads' layers.
    references : list of str
        Normalised, [utterances].
    hypotheses : list of list of str
        Normalised, of each head, [utterances][heads].
    errors : numpy.ndarray
        Word errors, [utterances, heads].
    words : int
        Reference words.
    scores : dict of str to numpy.ndarray
        What each rule sees, [utterances, heads].
    encoder_macs, head_macs : numpy.ndarray
        Of everything up to a head's layer, and of the head, ours and by thop's rules, [utterances, heads, 2].
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
        """At which head each utterance leaves, [utterances]."""
        return exits(rule, self.scores[rule], threshold, patience)

    def macs(self, rule: str, out: np.ndarray) -> np.ndarray:
        """MACs of each utterance that leaves at head `out` [utterances], ours and thop's, [utterances, 2]."""
        rows = np.arange(len(out))
        # Similarity looks at states only; the other rules compute every head on the way.
        heads = self.head_macs if rule in ("none", "similarity") else self.head_macs.cumsum(axis=1)
        return self.encoder_macs[rows, out] + heads[rows, out]

    def wer_percent(self, out: np.ndarray | int) -> float:
        """WER where utterances leave at heads `out`."""
        return 100 * float(self.errors[np.arange(len(self.errors)), out].sum()) / max(1, self.words)

    def mean_layer(self, out: np.ndarray) -> float:
        """Mean exit layer."""
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
        """Calibrate: the threshold that comes closest to a wanted depth, or the cheapest within a wanted loss.

        Arguments
        ---------
        rule : str
            The rule.
        mean_layer : float, optional
            Wanted mean exit layer.
        wer_loss_percent : float, optional
            Wanted: at most so many points of WER more than at full depth.
        patience : int
            Heads in a row that must be content.

        Raises
        ------
        UserError
            Where not exactly one of the two is wanted, or the rule has no threshold.
        """
        if (mean_layer is None) == (wer_loss_percent is None):
            raise UserError("calibrate to a mean layer or to a loss of WER: give exactly one of the two")
        if rule == "none":
            raise UserError("exit_rule: 'none' has no threshold to calibrate; choose another rule")
        values = np.unique(self.scores[rule][:, :-1])
        values = values[np.isfinite(values)]
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
        """Return what `score` would have found."""
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
    """Compute every utterance once.

    Arguments
    ---------
    model : CTCModel
        With exit heads, in evaluation mode.
    benchmark : Benchmark
        On what.
    macs : bool
        Whether MACs are counted.

    Raises
    ------
    UserError
        Where the model has no exit heads.
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
    """Return what follows the technique's name in the legend of plots: each rule has a colour of its own."""
    rule = result.details.get("exit_rule")
    return {None: "", "none": ", full depth"}.get(rule, f", {rule}")


def exit_heads(model: Any) -> ExitHeads:
    """Return a model's exit heads.

    Raises
    ------
    UserError
        Where it has none.
    """
    heads = model.head if isinstance(model, CTCModel) else None
    if not isinstance(heads, ExitHeads):
        raise UserError("this model has no exit heads; train one with recipes/early_exit/train.py")
    return heads


def exit_layers_of(hparams: dict[str, Any], encoder: Encoder) -> list[int]:
    """Return the layers that get a head, by default the upper half; refuse settings that would waste hours of training.

    Raises
    ------
    UserError
        Naming the key.
    """
    for key in ("exit_layers", "exit_loss_weights"):
        value = hparams[key]
        if value is not None and not (
            isinstance(value, list) and all(type(i) in (int, float) and i >= 0 for i in value)
        ):
            raise UserError(f"{key}: {value!r} is not a list of numbers")
    if hparams["exit_training"] not in ("joint", "two_step"):
        raise UserError(f"exit_training: '{hparams['exit_training']}' is not joint or two_step")
    first, epochs = hparams["first_step_epochs"], hparams["number_of_epochs"]
    if hparams["exit_training"] == "two_step" and first >= epochs:
        raise UserError(
            f"first_step_epochs: {first} of {epochs} epochs (number_of_epochs) leave none for the second step"
        )
    wanted = [key for key in CALIBRATIONS if hparams[f"calibrate_{key}"] is not None]
    if len(wanted) > 1 or (wanted and hparams["exit_threshold"] is not None):
        raise UserError(
            "give only one of exit_threshold, calibrate_mean_layer and calibrate_wer_loss_percent; the others null"
        )
    if wanted and hparams["exit_rule"] == "none":
        raise UserError(
            f"calibrate_{wanted[0]}: the exit_rule 'none' has no threshold to calibrate; choose another rule"
        )
    if encoder.layerdrop:
        raise UserError(
            f"train_layerdrop: {encoder.layerdrop} leaves out layers whose heads are trained; set it to 0.0"
        )
    layers = hparams["exit_layers"] or list(range(encoder.num_layers // 2 + 1, encoder.num_layers + 1))
    weights = hparams["exit_loss_weights"]
    if weights is not None and len(weights) != len(layers):
        raise UserError(f"exit_loss_weights: {list(weights)} are not {len(layers)} weights, one a layer of {layers}")
    return layers
