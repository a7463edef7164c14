r"""CLSR: experts for languages beside the frozen feed-forward blocks of Whisper, chosen token by token.

Ferraz, Boito, Brun, Nikoulina: "Multilingual DistilWhisper: Efficient Distillation of Multi-task Speech Models via
Language-Specific Experts" (arXiv 2311.01070), with the conditional language-specific routing of Zhang et al. (ICLR 2021).
The block of every encoder and decoder layer keeps its frozen original, `shared`, and gets for each language :math:`l` an
expert, at first a copy of it, and a gate:

.. math::
    G = w_2 \, \mathrm{ReLU}(W_1 x + b_1), \qquad
    h = g \, \mathrm{FFN}_l(x) + (1 - g) \, \mathrm{FFN}_{shared}(x), \\
    g = \sigma(G + \alpha \varepsilon), \; \varepsilon \sim N(0, 1), \; \alpha = 5 \min(s / S, 1) \text{ in training},
    \qquad g = [G \ge 0] \text{ afterwards}.

:math:`W_1` is 64 wide, drawn from N(0, 0.01), :math:`w_2 = 0`; :math:`s` is the training step of :math:`S`. With
probability 0.2 a layer skips its gates in a step and computes the shared block alone; an expert's output has dropout 0.3,
the gate's input 0.1. The loss has a term :math:`|\bar g - b|` that makes experts answer for a share :math:`b` of all tokens.
Only experts and gates are trained.

Deviations from the published code, all on purpose:

- Routing is per utterance: a batch may mix languages. One without a language, or in a language without expert, takes the
  shared blocks.
- The mean of :math:`g` is over real frames and tokens of layers that did not skip; theirs counts padding and skipped layers.
- :math:`\alpha` is 0 at step 0; theirs is 5 there. The layer's own dropout (0 in Whisper) falls on the mixture, not on the
  shared part.
- Afterwards each token computes its expert or the shared block, not both.
- `rank`: an expert may be a low-rank change to the shared block instead of a copy (:math:`W + B A` for both matrices,
  `B` = 0 at first): megabytes a language instead of hundreds. `layers`: experts in some layers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from efficient_asr.models.encoders.base import frame_mask
from efficient_asr.utils.errors import UserError, did_you_mean

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class ExpertSettings:
    """What experts look like.

    Attributes
    ----------
    layers : str or list of str
        `all`, `encoder`, `decoder`, or some, counted from 1: `[encoder.4, decoder.1]`.
    rank : int or None
        Of low-rank experts; None for copies of the whole block.
    gate_dim : int
        Width of the gates.

    Raises
    ------
    UserError
        For a rank or width that is no positive number.
    """

    layers: str | list[str] = "all"
    rank: int | None = None
    gate_dim: int = 64

    def __post_init__(self) -> None:
        for name in ("rank", "gate_dim"):
            value = getattr(self, name)
            if not (value is None and name == "rank") and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}: {value!r} is not a whole number of at least 1")

    def places(self, config: Any) -> list[tuple[str, int]]:
        """Return side and index of the layers that get experts, in a network of this configuration.

        Raises
        ------
        UserError
            Where there is no such layer.
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
                f"expert_layers: there is no layer {(unknown or ['in an empty list'])[0]}; there are {', '.join(names)}"
            )
        return [names[name] for name in names if name in self.layers]


def language_code(language: str) -> str:
    """Return the code of a language that may be given by its English name.

    Raises
    ------
    UserError
        Where Whisper has no such language.
    """
    lower = str(language).lower().strip("<|>")
    code = TO_LANGUAGE_CODE.get(lower, lower)
    if code not in LANGUAGES:
        raise UserError(f"Whisper has no language '{language}'.{did_you_mean(lower, [*TO_LANGUAGE_CODE, *LANGUAGES])}")
    return code


class Routing:
    """What all expert layers of a network share: which utterance is in which language, and what the gates did.

    Attributes
    ----------
    languages : dict
        Side -> code or None of every utterance of the batch, or one for all.
    real : dict
        Side -> real frames or tokens [batch], or None for all.
    progress : float
        Share of the training that is done, for the noise.
    skip_gate_prob : float
        How often a layer skips its gates in training.
    expert_dropout, gate_dropout : float
        On the output of experts, and on the input of gates, in training.
    gate_noise : float
        Standard deviation of the noise on the gates at the end of the training.
    gates : list
        In training: gate values, as (sum, count), of each layer that did not skip.
    counts : dict
        Otherwise: (side, layer) -> [batch, 2], tokens for which the gate was open, and tokens.
    """

    def __init__(self) -> None:
        self.languages: dict[str, list[str | None] | str | None] = dict.fromkeys(SIDES)
        self.real: dict[str, torch.Tensor | None] = dict.fromkeys(SIDES)
        self.progress, self.skip_gate_prob, self.expert_dropout = 0.0, 0.2, 0.3
        self.gate_dropout, self.gate_noise = 0.1, 5.0
        self._rows: dict[tuple, dict[str, torch.Tensor]] = {}
        self.gates: list[tuple[torch.Tensor, int]] = []
        self.counts: dict[tuple[str, int], torch.Tensor] = {}

    def set(self, side: str, languages: list[str | None] | str | None, real: torch.Tensor | None = None) -> None:
        """Say what comes next on one side, and forget what its gates did."""
        self.languages[side], self.real[side] = languages, real
        if side == "encoder":  # a new step: what nobody asked about must not pile up
            self.gates = []
        self.counts = {place: count for place, count in self.counts.items() if place[0] != side}
        self.forget()

    @contextmanager
    def using(
        self, side: str, languages: list[str | None] | str | None, real: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Route so for a while; what was chosen before holds again afterwards, while gates and counts stay."""
        before = self.languages[side], self.real[side]
        self.set(side, languages, real)
        try:
            yield
        finally:
            self.languages[side], self.real[side] = before
            self.forget()

    def forget(self) -> None:
        """Forget which rows went where, after experts have changed."""
        self._rows = {}

    def rows(self, side: str, size: int, known: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the rows of a batch of `size` by language, for languages with experts; beams follow their utterance.

        Raises
        ------
        UserError
            Where transformers has taken a batch of several languages apart, so that nobody can tell which rows are left.
        """
        key = (side, size, *known)
        if key not in self._rows:
            languages = self.languages[side]
            if not isinstance(languages, list):
                languages = [languages]
            if size % len(languages):
                raise UserError(
                    f"language: {len(languages)} were given, but {size} recordings are left: with long recordings, or "
                    "temperatures to fall back on, transformers takes a batch apart; call generate for each language by itself"
                )
            wanted = [language for language in languages for _ in range(size // len(languages))]
            self._rows[key] = {
                language: torch.tensor([i for i, other in enumerate(wanted) if other == language])
                for language in sorted({*wanted} & {*known})
            }
        return self._rows[key]

    def mask(self, side: str, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return which of the frames or tokens of some rows are real, like `values` [rows, size]."""
        real = self.real[side]
        if real is None:
            return torch.ones_like(values, dtype=torch.bool)
        return frame_mask(real[rows.to(real.device)], values.shape[1]).to(values.device)

    def count(self, place: tuple[str, int], rows: torch.Tensor, is_open: torch.Tensor, batch: int) -> None:
        """Note hard gates [rows, size] of a batch."""
        mask = self.mask(place[0], rows, is_open)
        found = torch.stack([(is_open & mask).sum(dim=1), mask.sum(dim=1)], dim=1)
        beams = batch // len(self.languages[place[0]]) if isinstance(self.languages[place[0]], list) else 1
        before = self.counts.get(place)
        if before is None or len(before) != batch // beams or before.device != found.device:
            before = self.counts[place] = torch.zeros(batch // beams, 2, dtype=torch.long, device=found.device)
        before.index_add_(0, rows.to(found.device) // beams, found)


class Expert(nn.Module):
    """One language's share of a layer: a feed-forward block, or a low-rank change to the shared one, and its gate.

    Arguments
    ---------
    fc1, fc2 : nn.Linear
        Of the shared block.
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
        """Return G [...] of [..., dim], with dropout on the input in training."""
        x = nn.functional.dropout(x, dropout, self.training)
        return self.gate_out(torch.relu(self.gate_in(x)))[..., 0]


class ExpertBlock(nn.Module):
    """A feed-forward block with experts; stands in a layer's `fc2`, whose `fc1` and activation are then identities.

    Arguments
    ---------
    layer : nn.Module
        Encoder or decoder layer of transformers' Whisper.
    place : tuple of (str, int)
        Its side and index.
    routing : Routing
        Shared by all layers.
    """

    def __init__(self, layer: nn.Module, place: tuple[str, int], routing: Routing) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = layer.fc1, layer.activation_fn, layer.fc2
        self.activation_dropout = layer.activation_dropout
        self.place, self.routing = place, routing
        self.experts = nn.ModuleDict()
        self.train(layer.training)

    def ffn(self, x: torch.Tensor, expert: Expert | None = None) -> torch.Tensor:
        """Compute the shared block, or an expert, of [..., dim]."""
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
        """Map [batch, time, dim]."""
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
                out = torch.empty_like(x, dtype=part.dtype) if out is None else out  # autocast chooses the type
                out = out.index_copy(0, rows.to(x.device), part.to(out.dtype))
        return out

    def _mix(self, x: torch.Tensor, rows: torch.Tensor, expert: Expert, batch: int) -> torch.Tensor:
        """Let the gate choose between expert and shared block for [rows, time, dim], some rows of a batch."""
        logits = expert.gate(x, self.routing.gate_dropout)
        if self.training:
            noise = self.routing.gate_noise * min(self.routing.progress, 1.0) * torch.randn_like(logits)
            gate = torch.sigmoid(logits + noise)
            real = gate.float()[self.routing.mask(self.place[0], rows, gate)]
            self.routing.gates.append((real.sum(), real.numel()))
            return gate[..., None] * self.ffn(x, expert) + (1 - gate)[..., None] * self.ffn(x)
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
        """Give a layer back what it had."""
        layer.fc1, layer.activation_fn, layer.fc2 = self.fc1, self.activation_fn, self.fc2
        layer.activation_dropout = self.activation_dropout

    def install(self, layer: nn.Module) -> None:
        """Stand in for a layer's block."""
        layer.fc1, layer.activation_fn, layer.activation_dropout = nn.Identity(), nn.Identity(), 0.0
        layer.fc2 = self


def gate_budget_loss(routing: Routing, budget: float) -> torch.Tensor:
    """Return how far the mean gate of a training step is from the budget, and forget the step; 0 where every layer skipped."""
    gates, routing.gates = routing.gates, []
    if not gates:
        return torch.tensor(0.0)
    return (sum(total for total, _ in gates) / sum(count for _, count in gates) - budget).abs()
