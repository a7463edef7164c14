r"""Find the layers whose int8 quantisation changes what a Whisper writes, and leave these in float.

The sensitivity of a group of layers is that of ZeroQ: how far the output distributions move when only this group is quantised.
Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework" (arXiv 2001.00281). Here

.. math:: \Omega_g = \frac{1}{N} \sum_{n=1}^{N} \mathrm{KL}\left(p(\cdot \mid y_{<n}, x) \,\|\, p_g(\cdot \mid y_{<n}, x)\right)

over the N tokens of the float model's own greedy texts :math:`y`, so no transcripts are needed. Groups are added in the order of
:math:`\Omega_g`, as long as the divergence of all of them together stays within a budget. How many is found by bisection, which
takes for granted that more groups diverge more; the divergence of those that are chosen is measured, not added up.

Deviations: ZeroQ chooses a number of bits for every layer under a limit of size, on synthetic inputs; here a layer has 8 bits or
stays in float, under a limit of divergence, on recordings. A group is one block of a layer (self-attention, cross-attention,
feed-forward) or the output layer. Every group has one vote whatever time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from efficient_asr.models.int8 import put_back, quantisable, replace
from efficient_asr.techniques.distillation.losses import kl_divergence

Observations = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def groups_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of layers (`decoder.layers.0.self_attn.q_proj`) by group: `decoder.layers.0.self_attn`, `... .mlp`."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        group = f"{parent}.mlp" if child in ("fc1", "fc2") else parent or name
        found.setdefault(group, []).append(name)
    return found


@torch.no_grad()
def observe(whisper: Any, wavs: Iterable[torch.Tensor], texts: Iterable[str], language: str | None) -> Observations:
    """Return recording [1, time], tokens [1, tokens] and the model's log-probabilities [1, n, vocabulary] of each recording.

    The last are those of the text and its end; tokens of the prompt, which decoding does not choose, are left out.

    Arguments
    ---------
    whisper : Whisper
        The model in float.
    wavs, texts : iterable
        Recordings [time] at 16 kHz, and the model's own texts.
    language : str, optional
        Their language.
    """
    found = []
    for wav, text in zip(wavs, texts, strict=True):
        tokens = torch.tensor([whisper.labels.encode_row({"text": text, "language": language})])[:, :-1]
        encoded = whisper.encode(wav[None], torch.tensor([len(wav)]), languages=[language])
        found.append((wav[None], tokens, _log_probs(whisper, encoded, tokens)))
    return found


def _log_probs(whisper: Any, encoded: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [1, n, vocabulary] of the tokens behind the prompt, given `tokens` [1, tokens]."""
    return whisper.predict(encoded, tokens)[:, whisper.labels.prompt_length - 1 :].log_softmax(-1)


class Sensitivity:
    """Divergence of a model with some groups in int8 from itself in float.

    Arguments
    ---------
    whisper : Whisper
        The model in float, on the CPU; it is in float again after every call.
    observations : list
        Of `observe`.
    language : str, optional
        Language of the recordings.
    """

    def __init__(self, whisper: Any, observations: Observations, language: str | None = None) -> None:
        self.whisper, self.observations, self.language = whisper, observations, language
        self.groups = groups_of(quantisable(whisper.network))
        self._encoded: list[Any] = []

    @torch.no_grad()
    def __call__(self, groups: Iterable[str]) -> float:
        """Return the mean divergence in nats a token with these groups in int8."""
        groups = list(groups)
        names = [name for group in groups for name in self.groups[group]]
        kept = replace(self.whisper.network, names)
        try:
            total = tokens = 0
            for (_, target, log_probs), encoded in zip(self.observations, self._states(groups), strict=True):
                own = _log_probs(self.whisper, encoded, target)
                total += float(kl_divergence(log_probs, own).double().sum())
                tokens += own.shape[1]
        finally:
            put_back(self.whisper.network, kept)
        return total / tokens

    def _states(self, groups: list[str]) -> list[Any]:
        """Return the encoder's output for every recording; that of the float encoder is kept."""
        in_float = not any(group.startswith("encoder") for group in groups)
        if in_float and self._encoded:
            return self._encoded
        found = [
            self.whisper.encode(wav, torch.tensor([wav.shape[1]]), languages=[self.language])
            for wav, *_ in self.observations
        ]
        if in_float:
            self._encoded = found
        return found


def search(
    divergence: Callable[[Iterable[str]], float],
    groups: Iterable[str],
    budget_nats: float,
    report: Callable[[str, float], None] = lambda group, nats: None,
) -> tuple[dict[str, float], list[str], dict[int, float]]:
    """Return the divergence of each group alone, the groups that are chosen, and the divergences of several groups together.

    The last are by number of groups, those that move the output least; that of the chosen ones and that of all are among them.

    Arguments
    ---------
    divergence : callable
        `Sensitivity`, or a function like it.
    groups : iterable of str
        What may be quantised.
    budget_nats : float
        Largest divergence of all chosen groups together, in nats a token.
    report : callable
        Called with every group and its divergence.
    """
    alone = {}
    for group in groups:
        alone[group] = divergence([group])
        report(group, alone[group])
    order = sorted(alone, key=alone.get)
    fits, exceeds, measured = 0, len(order) + 1, {0: 0.0}
    while exceeds - fits > 1:
        # all of them first: it is what one would like best
        middle = len(order) if exceeds > len(order) and fits == 0 else (fits + exceeds) // 2
        measured[middle] = divergence(order[:middle])
        if measured[middle] <= budget_nats:
            fits = middle
        else:
            exceeds = middle
    return alone, order[:fits], measured
