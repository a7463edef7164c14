r"""Early exit: stop each utterance at the first layer whose output is good enough.

Zaiem, Algayres, Parcollet, Essid, Ravanelli: "Fine-tuning Strategies for Faster Inference using Speech Self-Supervised
Models: A Comparative Study" (arXiv 2303.06740), section on early exiting. Some layers :math:`e` have a CTC head each;
training minimises the weighted sum of the heads' losses (weights 1 in the paper)

.. math:: \mathcal{L} = \sum_e w_e \, \mathrm{CTC}(\mathrm{head}_e(h_e), y).

At inference, an utterance with :math:`T` real frames exits at the first of these layers where

- `entropy`:     :math:`-\frac{1}{T} \sum_t \sum_c p_{tc} \log p_{tc} < \tau` (nats) for the head's softmax :math:`p`;
- `similarity`:  :math:`\frac{1}{T} \sum_t \cos(h_{e,t}, h_{e-1,t}) > \tau`; only the head at the exit layer is computed;
- `confidence`:  :math:`\frac{1}{T} \sum_t \max_c \log p_{tc} > \tau`;
- `agreement`:   the edit distance between the greedy labels of this head and the previous head, divided by the length of the
  longer sequence, is at most :math:`\tau` (0: they are equal);

and at the last layer otherwise (`none`: always at the last layer). The first two rules are from the paper, following DeeBERT
(arXiv 2004.12993) and HuBERT-EE (arXiv 2204.06328); agreement is the criterion of PABEE (arXiv 2006.04152). With
`exit_patience: k` the condition must hold at k consecutive heads.

As in the paper's code, LayerDrop is off while heads are trained. Deviations from that code:

- The paper's code averages over the batch, padding included, and the whole batch exits together. Here each utterance exits on
  its own, based on its real frames. Utterances that exit are no longer computed; the rest continue as a smaller, shorter batch.
  A transcript does not depend on the rest of the batch.
- Heads come after the encoder's final layer norm (and `output_norm`), which they share, instead of before it. The last head is
  therefore identical to the baseline's, and heads can be initialised as copies of it.
- Validation scores every head at full depth; the paper's code exits early there too and selects checkpoints by the result.
- Heads are ordinary parameters: trained, saved, moved and counted with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import nn

from efficient_asr.data import frame_mask
from efficient_asr.models.ctc import CTCHead, CTCOutput, greedy_labels
from efficient_asr.models.encoders.base import Encoder, EncoderState
from efficient_asr.models.parts import Part
from efficient_asr.utils.errors import UserError, did_you_mean

RULES = ("none", "entropy", "similarity", "confidence", "agreement")
# Thresholds at which no utterance exits early.
NEVER = {"none": 0.0, "entropy": 0.0, "similarity": 2.0, "confidence": 0.0, "agreement": -1.0}


def should_exit(rule: str, scores: Any, threshold: float) -> Any:
    """Whether scores (numbers, arrays or tensors) meet the threshold to exit."""
    if rule == "none":
        return scores < -math.inf
    if rule == "entropy":
        return scores < threshold
    return scores <= threshold if rule == "agreement" else scores > threshold


def mean_over_frames(values: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """Mean [batch] over the real frames of [batch, frames]."""
    mask = frame_mask(frame_lengths, values.shape[1])
    return values.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)


def entropy(log_probs: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats [batch] of [batch, frames, labels]."""
    return mean_over_frames(-(log_probs.exp() * log_probs).sum(dim=-1), frame_lengths)


def confidence(log_probs: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """Mean of the highest log-probability per frame [batch] of [batch, frames, labels]."""
    return mean_over_frames(log_probs.amax(dim=-1), frame_lengths)


def similarity(before: torch.Tensor, after: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity [batch] of two layers' hidden states [batch, frames, dim]."""
    return mean_over_frames(torch.cosine_similarity(before, after, dim=-1), frame_lengths)


def disagreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Edit distance of two label sequences divided by the length of the longer one, 0 to 1."""
    return Levenshtein.normalized_distance(before, after)


class ExitHeads(Part):
    """CTC heads on some layers, and the rule that decides when utterances exit.

    Arguments
    ---------
    heads : list of CTCHead
        One for each layer of `layers`.
    layers : list of int
        Layers with a head, counted from 1, in ascending order; the last must be the encoder's last layer.
    rule : str
        `none`, `entropy`, `similarity`, `confidence` or `agreement`.
    threshold : float or None
        Threshold of the rule; None never exits early.
    patience : int
        Consecutive heads that must meet the threshold.

    Raises
    ------
    UserError
        If an argument is invalid.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        layers: Sequence[int],
        rule: str = "none",
        threshold: float | None = None,
        patience: int = 1,
    ) -> None:
        super().__init__()
        layers = list(layers)
        if not layers or not all(type(i) is int and i >= 1 for i in layers) or layers != sorted({*layers}):
            raise UserError(f"exit_layers: expected an ascending list of layers, counted from 1, got {layers}")
        if len(heads) != len(layers):
            raise ValueError(f"got {len(heads)} heads for {len(layers)} layers")
        self.heads, self.layers = nn.ModuleList(heads), layers
        self.set_rule(rule, threshold, patience)

    def set_rule(self, rule: str, threshold: float | None = None, patience: int = 1) -> None:
        """Set the exit rule, its threshold and patience; see the class."""
        if rule not in RULES:
            raise UserError(
                f"exit_rule: expected one of {', '.join(RULES)}, got '{rule}'.{did_you_mean(str(rule), RULES)}"
            )
        threshold = NEVER[rule] if threshold is None else threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
            raise UserError(f"exit_threshold: expected a number, got {threshold!r}")
        if type(patience) is not int or patience < 1:
            raise UserError(f"exit_patience: expected an integer >= 1, got {patience!r}")
        self.rule, self.threshold, self.patience = rule, float(threshold), patience

    def keep(self, layers: Sequence[int]) -> None:
        """Keep only the heads on `layers`, in place: heads that are not used cost time and memory. The last layer's stays.

        Raises
        ------
        UserError
            If there is no head on one of the layers.
        """
        unknown = sorted(set(layers) - set(self.layers))
        if unknown:
            raise UserError(f"layers: the model has heads on layers {self.layers}, but not on {unknown}")
        kept = sorted({*layers, self.layers[-1]})
        self.heads = nn.ModuleList([self.heads[self.layers.index(layer)] for layer in kept])
        self.layers = kept

    def check_patience(self) -> None:
        """Check that an utterance can exit early at all.

        Raises
        ------
        UserError
            If there are fewer scores before the last head than `patience`.
        """
        scores = len(self.layers) - 1 - (self.rule == "agreement")  # which needs two heads for its first one
        if self.rule != "none" and self.patience > max(1, scores):
            raise UserError(
                f"exit_patience: {self.patience} heads in a row are needed, but {self.rule} can score only {scores} before the "
                "last layer; lower it, or train more heads"
            )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments shared by all heads."""
        return self.heads[0].config

    @property
    def frames_per_state(self) -> int:
        """CTC frames per hidden state."""
        return self.heads[0].frames_per_state

    # Never the identity: even at full depth, the network was trained jointly with all its heads.
    technique = "early_exit"

    @property
    def label(self) -> str:
        """Label with rule, threshold and patience."""
        if self.threshold == NEVER[self.rule]:
            return "full depth" if self.rule == "none" else f"{self.rule} never"
        return f"{self.rule} {self.threshold:.6g}" + (f" patience {self.patience}" if self.patience > 1 else "")

    def check(self, encoder: Encoder) -> None:
        """Check that the encoder runs plainly layer by layer, and that its last layer has a head.

        Raises
        ------
        UserError
            If the encoder does not meet these conditions.
        """
        if type(encoder).forward is not Encoder.forward:
            raise UserError(
                f"exit heads cannot be used with {type(encoder).__name__}: both decide which layers run; use only one"
            )
        if self.layers[-1] != encoder.num_layers:
            raise UserError(
                f"exit_layers: the last is {self.layers[-1]}, but must be the encoder's last layer, {encoder.num_layers}: "
                "all remaining utterances exit there"
            )

    def read(
        self,
        encoder: Encoder,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        only: Sequence[int] | None = None,
        train_encoder: bool = True,
    ) -> CTCOutput:
        """Run an encoder layer by layer on `wavs` [batch, time] with `lengths` [batch], with early exit.

        Arguments
        ---------
        encoder : Encoder
            The encoder.
        wavs, lengths : torch.Tensor
            [batch, time] and real samples [batch].
        only : list of int, optional
            For training: run all layers without early exit, and the heads on these layers.
        train_encoder : bool
            With `only`: whether the encoder receives gradients.

        Returns
        -------
        CTCOutput
            With `exit_layer` in the details of every utterance. With `only`, logits are [heads, batch, frames, labels].
        """
        if only is not None:
            return self._read_heads(encoder, wavs, lengths, only, train_encoder)
        state, rows = encoder.begin(wavs, lengths), torch.arange(len(wavs), device=wavs.device)
        decisions = _Decisions(self.rule, self.threshold, self.patience, len(wavs))
        parts = []
        for index in range(encoder.num_layers):
            before = state
            state = encoder.run_layer(index, state)
            layer = index + 1
            if layer not in self.layers:
                continue
            head, logits = self.heads[self.layers.index(layer)], None
            if layer == encoder.num_layers:
                leaving = torch.ones_like(rows, dtype=torch.bool)
            else:
                if self.rule not in ("none", "similarity"):
                    logits, frame_lengths = head(encoder.end(state), state.frame_lengths)
                    scored = logits.float().log_softmax(dim=-1), frame_lengths
                else:
                    scored = before.states, state.states, state.frame_lengths
                leaving = decisions(rows, scored)
            if not bool(leaving.any()):
                continue
            out = leaving.nonzero()[:, 0]
            if logits is None:
                part = state if bool(leaving.all()) else state.select(out)
                logits, frame_lengths = head(encoder.end(part), part.frame_lengths)
            else:
                logits, frame_lengths = logits[out], frame_lengths[out]
            parts.append((rows[out], layer, logits, frame_lengths))
            if bool(leaving.all()):
                break
            stay = (~leaving).nonzero()[:, 0]
            state, rows = state.select(stay), rows[stay]
        return _put_together(parts)

    def _read_heads(
        self, encoder: Encoder, wavs: torch.Tensor, lengths: torch.Tensor, only: Sequence[int], train_encoder: bool
    ) -> CTCOutput:
        """Run all layers; return logits [heads, batch, frames, labels] of the heads on the layers `only`."""
        with torch.set_grad_enabled(train_encoder and torch.is_grad_enabled()):
            encoded = encoder(wavs, lengths, output_hidden_states=True)
            ends = [encoder.end(EncoderState(encoded.hidden_states[layer], encoded.frame_lengths)) for layer in only]
        heads = [self.heads[self.layers.index(layer)] for layer in only]
        read = [head(states, encoded.frame_lengths) for head, states in zip(heads, ends, strict=True)]
        return CTCOutput(torch.stack([logits for logits, _ in read]), read[0][1])

    def trace(
        self, encoder: Encoder, wavs: torch.Tensor, lengths: torch.Tensor, run: Callable[..., Any]
    ) -> list[dict[str, Any]]:
        """Run one utterance to full depth once, recording the score of every rule at every head.

        Arguments
        ---------
        encoder : Encoder
            The encoder.
        wavs, lengths : torch.Tensor
            Encoder inputs, [1, time] and [1].
        run : callable
            `run(fn, *args)` returns the output of `fn(*args)` and its cost; costs must support addition.

        Returns
        -------
        list of dict
            For each head: `layer`, its greedy `labels`, the score of each rule, the cost of the encoder up to this layer
            (`encoder_cost`) and the cost of this head (`head_cost`).
        """
        state, cost = run(encoder.begin, wavs, lengths)
        found, labels = [], None
        for index in range(encoder.num_layers):
            before = state
            state, more = run(encoder.run_layer, index, state)
            cost = cost + more
            if index + 1 not in self.layers:
                continue
            head = self.heads[self.layers.index(index + 1)]
            (logits, frame_lengths), head_cost = run(_end, encoder, head, state)
            log_probs = logits.float().log_softmax(dim=-1)
            new = greedy_labels(log_probs, frame_lengths)[0]
            found.append(
                {
                    "layer": index + 1, "labels": new,
                    "entropy": float(entropy(log_probs, frame_lengths)),
                    "confidence": float(confidence(log_probs, frame_lengths)),
                    "similarity": float(similarity(before.states, state.states, state.frame_lengths)),
                    "agreement": math.inf if labels is None else disagreement(labels, new),
                    "none": 0.0, "encoder_cost": cost, "head_cost": head_cost,
                }
            )  # fmt: skip
            labels = new
        return found

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the mean exit layer and how many utterances exited at each layer."""
        found = [record["exit_layer"] for record in records if "exit_layer" in record]
        if not found:
            return {}
        counts = {str(layer): found.count(layer) for layer in self.layers}
        return {"mean_exit_layer": sum(found) / len(found), "exit_layers": counts}

    def init_from(self, trained: nn.Module) -> dict[str, torch.Tensor]:
        """Return initial weights from the trained head on the same layer, or else from the only or last trained head."""
        same = dict(zip(trained.layers, trained.heads, strict=True)) if isinstance(trained, ExitHeads) else {}
        copies = [head.init_from(same.get(layer, trained)) for layer, head in zip(self.layers, self.heads, strict=True)]
        return {f"heads.{i}.{key}": value for i, weights in enumerate(copies) for key, value in weights.items()}

    def single_head(self) -> CTCHead:
        """Return the last head."""
        return self.heads[-1]

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`."""
        return {
            "head": self.config, "layers": self.layers, "rule": self.rule, "threshold": self.threshold,
            "patience": self.patience,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ExitHeads:
        """Build heads with random weights."""
        rest = {key: config[key] for key in ("layers", "rule", "threshold", "patience")}
        return cls([CTCHead.from_config(config["head"]) for _ in config["layers"]], **rest)


def _end(encoder: Encoder, head: nn.Module, state: EncoderState) -> tuple[torch.Tensor, torch.Tensor]:
    return head(encoder.end(state), state.frame_lengths)


class _Decisions:
    """Exit decisions, with the state of each utterance over consecutive heads."""

    def __init__(self, rule: str, threshold: float, patience: int, batch: int) -> None:
        self.rule, self.threshold, self.patience = rule, threshold, patience
        self.content, self.labels = [0] * batch, [None] * batch

    def __call__(self, rows: torch.Tensor, scored: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return boolean [rows] for the arguments of a function in `SCORES`; `agreement` uses log_probs and lengths."""
        if self.rule == "none":
            return torch.zeros_like(rows, dtype=torch.bool)
        names = rows.tolist()
        if self.rule == "agreement":
            found = greedy_labels(*scored)
            scores = [
                math.inf if self.labels[name] is None else disagreement(self.labels[name], new)
                for name, new in zip(names, found, strict=True)
            ]
            for name, new in zip(names, found, strict=True):
                self.labels[name] = new
        else:
            scores = SCORES[self.rule](*scored).tolist()
        for name, score in zip(names, scores, strict=True):
            self.content[name] = self.content[name] + 1 if should_exit(self.rule, score, self.threshold) else 0
        return torch.tensor([self.content[name] >= self.patience for name in names], device=rows.device)


SCORES: dict[str, Callable[..., torch.Tensor]] = {
    "entropy": entropy,
    "confidence": confidence,
    "similarity": similarity,
}


def _put_together(parts: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]]) -> CTCOutput:
    """Merge rows that exited at different layers back into one batch."""
    if len(parts) == 1:
        rows, layer, logits, frame_lengths = parts[0]
        return CTCOutput(logits, frame_lengths, [{"exit_layer": layer} for _ in rows])
    count, frames = sum(len(rows) for rows, *_ in parts), max(logits.shape[1] for *_, logits, _ in parts)
    first = parts[0][2]
    together = first.new_zeros(count, frames, first.shape[2])
    lengths = parts[0][3].new_zeros(count)
    details: list[dict[str, Any]] = [{} for _ in range(count)]
    for rows, layer, logits, frame_lengths in parts:
        together[rows, : logits.shape[1]] = logits
        lengths[rows] = frame_lengths
        for row in rows.tolist():
            details[row] = {"exit_layer": layer}
    return CTCOutput(together, lengths, details)


def exits(rule: str, scores: np.ndarray, threshold: float, patience: int = 1) -> np.ndarray:
    """Return the index of the head where each utterance exits, [utterances], for scores [utterances, heads]."""
    content = should_exit(rule, scores, threshold)
    content[:, -1] = False
    held = content.copy()
    for k in range(1, patience):
        held[:, k:] &= content[:, :-k]
        held[:, :k] = False
    last = scores.shape[1] - 1
    return np.where(held.any(axis=1), held.argmax(axis=1), last)
