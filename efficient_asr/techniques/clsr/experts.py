r"""CLSR: language experts next to Whisper's frozen feed-forward blocks, selected token by token.

Ferraz, Boito, Brun, Nikoulina: "Multilingual DistilWhisper: Efficient Distillation of Multi-task Speech Models via
Language-Specific Experts" (arXiv 2311.01070), with the conditional language-specific routing of Zhang et al. (ICLR 2021).
Every encoder and decoder layer keeps its original feed-forward block, frozen (`shared`). For each language :math:`l` the layer
gets an expert, initialised as a copy of that block, and a gate:

.. math::
    G = w_2 \, \mathrm{ReLU}(W_1 x + b_1), \qquad
    h = g \, \mathrm{FFN}_l(x) + (1 - g) \, \mathrm{FFN}_{shared}(x), \\
    g = \sigma(G + \alpha \varepsilon), \; \varepsilon \sim N(0, 1), \; \alpha = 5 \min(s / S, 1) \text{ in training},
    \qquad g = [G \ge 0] \text{ at inference}.

The gate is 64 wide. Initially :math:`W_1` is drawn from N(0, 0.01) and :math:`w_2 = 0`; :math:`s` is the current training
step out of :math:`S`. In a training step, a layer skips its gates with probability 0.2 and computes only the shared block.
Dropout is 0.3 on the output of experts and 0.1 on the input of gates. The loss has a term :math:`|\bar g - b|` that pulls the
share of tokens handled by experts towards :math:`b`. Only experts and gates are trained.

Deviations from the published code, all intentional:

- Routing is per utterance: a batch may mix languages. Utterances without a language, or in a language without an expert, use
  the shared blocks.
- The mean of :math:`g` covers the unpadded frames and tokens of layers that did not skip; the published code also counts
  padding and skipped layers.
- :math:`\alpha` is 0 at step 0; it is 5 there in the published code. The layer's own dropout (0 in Whisper) is applied to the
  mixture, not to the shared part.
- At inference each token computes either its expert or the shared block, not both.
- `rank`: an expert may be a low-rank update of the shared block instead of a copy (:math:`W + B A` for both matrices,
  initially `B` = 0), which takes megabytes per language instead of hundreds. `layers`: experts in selected layers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from efficient_asr.data import frame_mask
from efficient_asr.utils.errors import UserError, did_you_mean

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class ExpertSettings:
    """Shape and placement of experts.

    Attributes
    ----------
    layers : str or list of str
        `all`, `encoder`, `decoder`, or a list of layers, counted from 1: `[encoder.4, decoder.1]`.
    rank : int or None
        Rank of low-rank experts; None for copies of the whole block.
    gate_dim : int
        Width of the gates.

    Raises
    ------
    UserError
        If `rank` or `gate_dim` is not a positive integer.
    """

    layers: str | list[str] = "all"
    rank: int | None = None
    gate_dim: int = 64

    def __post_init__(self) -> None:
        for name in ("rank", "gate_dim"):
            value = getattr(self, name)
            if not (value is None and name == "rank") and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}: expected an integer >= 1, got {value!r}")

    def places(self, config: Any) -> list[tuple[str, int]]:
        """Return side and index of the layers that get experts in a network with this configuration.

        Raises
        ------
        UserError
            If a layer does not exist.
        """
        every = [(s, i) for s in SIDES for i in range(getattr(config, f"{s}_layers"))]
        if isinstance(self.layers, str):
            if self.layers not in ("all", *SIDES):
                raise UserError(
                    f"expert_layers: '{self.layers}' is not all, encoder, decoder or a list such as [encoder.4]"
                )
            return [(side, i) for side, i in every if self.layers in ("all", side)]
        names = {f"{side}.{i + 1}": (side, i) for side, i in every}
        unknown = [name for name in self.layers if name not in names]
        if unknown or not self.layers:
            raise UserError(
                f"expert_layers: got {(unknown or ['an empty list'])[0]}, expected a selection of {', '.join(names)}"
            )
        return [names[name] for name in names if name in self.layers]


def language_code(language: str) -> str:
    """Return the code of a language given by code or English name.

    Raises
    ------
    UserError
        If Whisper does not support the language.
    """
    lower = str(language).lower().strip("<|>")
    code = TO_LANGUAGE_CODE.get(lower, lower)
    if code not in LANGUAGES:
        raise UserError(
            f"Whisper does not support the language '{language}'.{did_you_mean(lower, [*TO_LANGUAGE_CODE, *LANGUAGES])}"
        )
    return code


class Routing:
    """State shared by all expert layers of a network: the language of each utterance, and gate statistics.

    Attributes
    ----------
    languages : dict
        Side -> language code or None for every utterance of the batch, or a single value for all.
    real : dict
        Side -> number of unpadded frames or tokens [batch], or None if there is no padding.
    progress : float
        Completed share of the training; scales the noise.
    skip_gate_prob : float
        Probability that a layer skips its gates in a training step.
    expert_dropout, gate_dropout : float
        Dropout in training on the output of experts and on the input of gates.
    gate_noise : float
        Standard deviation of the gate noise at the end of training.
    override_gates : callable or None
        Returns the gate logits to use at inference, given side and layer and the computed ones [rows, size], for experiments.
    gates : list
        In training: gate values, as (sum, count), of each layer that did not skip.
    counts : dict
        In evaluation: (side, layer) -> [batch, 2], tokens with an open gate and all tokens.
    """

    def __init__(self) -> None:
        self.languages: dict[str, list[str | None] | str | None] = dict.fromkeys(SIDES)
        self.real: dict[str, torch.Tensor | None] = dict.fromkeys(SIDES)
        self.progress, self.skip_gate_prob, self.expert_dropout = 0.0, 0.2, 0.3
        self.gate_dropout, self.gate_noise = 0.1, 5.0
        self.override_gates: Callable[[tuple[str, int], torch.Tensor], torch.Tensor] | None = None
        self._rows: dict[tuple, dict[str, torch.Tensor]] = {}
        self.gates: list[tuple[torch.Tensor, int]] = []
        self.counts: dict[tuple[str, int], torch.Tensor] = {}

    def set(self, side: str, languages: list[str | None] | str | None, real: torch.Tensor | None = None) -> None:
        """Set the routing of one side and reset its gate statistics."""
        self.languages[side], self.real[side] = languages, real
        if side == "encoder":  # a new step: discard gate values that no loss has consumed
            self.gates = []
        self.counts = {place: count for place, count in self.counts.items() if place[0] != side}
        self.forget()

    @contextmanager
    def using(
        self, side: str, languages: list[str | None] | str | None, real: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Temporarily override the routing of one side; the gate statistics of the override are kept."""
        before = self.languages[side], self.real[side]
        self.set(side, languages, real)
        try:
            yield
        finally:
            self.languages[side], self.real[side] = before
            self.forget()

    def forget(self) -> None:
        """Clear the cached row assignment, for instance after experts have changed."""
        self._rows = {}

    def rows(self, side: str, size: int, known: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the rows of a batch of `size` by language, for languages with experts; the beams of an utterance are adjacent.

        Raises
        ------
        UserError
            If transformers has split a batch of several languages, so that the remaining rows cannot be identified.
        """
        key = (side, size, *known)
        if key not in self._rows:
            languages = self.languages[side]
            if not isinstance(languages, list):
                languages = [languages]
            if size % len(languages):
                raise UserError(
                    f"language: {len(languages)} languages were given, but {size} recordings remain: transformers splits a "
                    "batch of long recordings, or with temperature fallback; call generate once per language"
                )
            wanted = [language for language in languages for _ in range(size // len(languages))]
            self._rows[key] = {
                language: torch.tensor([i for i, other in enumerate(wanted) if other == language])
                for language in sorted({*wanted} & {*known})
            }
        return self._rows[key]

    def mask(self, side: str, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the padding mask of some rows, True for real frames or tokens, shaped like `values` [rows, size]."""
        real = self.real[side]
        if real is None:
            return torch.ones_like(values, dtype=torch.bool)
        lengths = real[rows.to(real.device)]
        if side == "decoder":  # a hypothesis that has ended has no token
            return (torch.arange(values.shape[1], device=lengths.device) < lengths[:, None]).to(values.device)
        return frame_mask(lengths, values.shape[1]).to(values.device)

    def count(self, place: tuple[str, int], rows: torch.Tensor, is_open: torch.Tensor, batch: int) -> None:
        """Add hard gates [rows, size] of a batch to the counts."""
        mask = self.mask(place[0], rows, is_open)
        found = torch.stack([(is_open & mask).sum(dim=1), mask.sum(dim=1)], dim=1)
        beams = batch // len(self.languages[place[0]]) if isinstance(self.languages[place[0]], list) else 1
        before = self.counts.get(place)
        if before is None or len(before) != batch // beams or before.device != found.device:
            before = self.counts[place] = torch.zeros(batch // beams, 2, dtype=torch.long, device=found.device)
        before.index_add_(0, rows.to(found.device) // beams, found)


class Expert(nn.Module):
    """The expert of one language in one layer: a feed-forward block or a low-rank update of the shared one, and its gate.

    Arguments
    ---------
    fc1, fc2 : nn.Linear
        Linear layers of the shared block.
    settings : ExpertSettings
        Size of gate and block.
    """

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, settings: ExpertSettings) -> None:
        super().__init__()
        size, rank = fc1.in_features, settings.rank
        self.gate_in, self.gate_out = nn.Linear(size, settings.gate_dim), nn.Linear(settings.gate_dim, 1, bias=False)
        nn.init.normal_(self.gate_in.weight, std=0.01)
        nn.init.zeros_(self.gate_in.bias)
        nn.init.zeros_(self.gate_out.weight)
        self.low_rank = rank is not None
        for name, linear in (("fc1", fc1), ("fc2", fc2)):
            if self.low_rank:
                part = nn.Sequential(
                    nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
                )
                nn.init.zeros_(part[1].weight)
            else:
                part = nn.Linear(linear.in_features, linear.out_features)
                part.load_state_dict(linear.state_dict())
            self.add_module(name, part)
        self.to(fc1.weight)

    def gate(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Return the gate logits G [...] for `x` [..., dim], with dropout on the input in training."""
        x = nn.functional.dropout(x, dropout, self.training)
        return self.gate_out(torch.relu(self.gate_in(x)))[..., 0]


class ExpertBlock(nn.Module):
    """A feed-forward block with experts; it replaces a layer's `fc2`, while `fc1` and the activation become identities.

    Arguments
    ---------
    layer : nn.Module
        Encoder or decoder layer of transformers' Whisper.
    place : tuple of (str, int)
        Side and index of the layer.
    routing : Routing
        State shared by all layers.
    """

    def __init__(self, layer: nn.Module, place: tuple[str, int], routing: Routing) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = layer.fc1, layer.activation_fn, layer.fc2
        self.activation_dropout = layer.activation_dropout
        self.place, self.routing = place, routing
        self.experts = nn.ModuleDict()
        self.train(layer.training)

    def ffn(self, x: torch.Tensor, expert: Expert | None = None) -> torch.Tensor:
        """Apply the shared block, or an expert, to [..., dim]."""
        if expert is None or expert.low_rank:
            inner = self.fc1(x) if expert is None else self.fc1(x) + expert.fc1(x)
        else:
            inner = expert.fc1(x)
        inner = nn.functional.dropout(self.activation_fn(inner), self.activation_dropout, self.training)
        if expert is None:
            return self.fc2(inner)
        out = self.fc2(inner) + expert.fc2(inner) if expert.low_rank else expert.fc2(inner)
        return nn.functional.dropout(out, self.routing.expert_dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, time, dim] to the same shape."""
        groups = self.routing.rows(self.place[0], len(x), self.experts)
        skipped = self.training and groups and float(torch.rand(())) < self.routing.skip_gate_prob
        if not groups or skipped:
            return self.ffn(x)
        if len(groups) == 1 and len(next(iter(groups.values()))) == len(x):
            ((language, rows),) = groups.items()
            return self._mix(x, rows, self.experts[language], len(x))
        rest = torch.ones(len(x), dtype=torch.bool)
        for rows in groups.values():
            rest[rows] = False
        parts = [(rest.nonzero()[:, 0], None), *((rows, self.experts[a]) for a, rows in groups.items())]
        out = None
        for rows, expert in parts:
            if len(rows):
                part = x[rows.to(x.device)]
                part = self.ffn(part) if expert is None else self._mix(part, rows, expert, len(x))
                out = torch.empty_like(x, dtype=part.dtype) if out is None else out  # autocast determines the dtype
                out = out.index_copy(0, rows.to(x.device), part.to(out.dtype))
        return out

    def _mix(self, x: torch.Tensor, rows: torch.Tensor, expert: Expert, batch: int) -> torch.Tensor:
        """Mix expert and shared block by the gate for `x` [rows, time, dim], some rows of a batch."""
        logits = expert.gate(x, self.routing.gate_dropout)
        if self.training:
            noise = self.routing.gate_noise * min(self.routing.progress, 1.0) * torch.randn_like(logits)
            gate = torch.sigmoid(logits + noise)
            real = gate.float()[self.routing.mask(self.place[0], rows, gate)]
            self.routing.gates.append((real.sum(), real.numel()))
            return gate[..., None] * self.ffn(x, expert) + (1 - gate)[..., None] * self.ffn(x)
        if self.routing.override_gates is not None:
            logits = self.routing.override_gates(self.place, logits)
        is_open = logits >= 0
        self.routing.count(self.place, rows, is_open, batch)
        share = int(is_open.sum())
        if share in (0, is_open.numel()):
            return self.ffn(x, expert if share else None)
        own, shared = self.ffn(x[is_open], expert), self.ffn(x[~is_open])
        out = torch.empty_like(x, dtype=own.dtype)
        out[is_open], out[~is_open] = own, shared.to(own.dtype)
        return out

    def restore(self, layer: nn.Module) -> None:
        """Restore the layer's original block."""
        layer.fc1, layer.activation_fn, layer.fc2 = self.fc1, self.activation_fn, self.fc2
        layer.activation_dropout = self.activation_dropout

    def install(self, layer: nn.Module) -> None:
        """Replace the layer's block by this one."""
        layer.fc1, layer.activation_fn, layer.activation_dropout = nn.Identity(), nn.Identity(), 0.0
        layer.fc2 = self


def gate_budget_loss(routing: Routing, budget: float) -> torch.Tensor:
    """Return the distance of the step's mean gate from the budget and clear the gate values; 0 if every layer skipped."""
    gates, routing.gates = routing.gates, []
    if not gates:
        return torch.tensor(0.0)
    return (sum(total for total, _ in gates) / sum(count for _, count in gates) - budget).abs()
