"""The interface of routers: modules that look at something and say how hard an utterance is for the smaller of two models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LOOKS_AT = ("audio", "encoder", "transcript", "large_encoder")


@dataclass
class Evidence:
    """What a router may look at.

    Attributes
    ----------
    wavs : torch.Tensor
        [batch, time] at 16 kHz.
    lengths : torch.Tensor
        Real samples, [batch].
    hidden_states : tuple of torch.Tensor or None
        Of the encoder that the router asked for: input of the first layer and output of every layer, each [batch, frames, dim].
    texts : list of str
        Of the smaller model, where the router asked for transcripts.
    details : list of dict
        What came with them, such as `avg_logprob`.
    """

    wavs: torch.Tensor
    lengths: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    texts: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)


class Router(nn.Module):
    """Base class of routers.

    Attributes
    ----------
    looks_at : str
        `audio`; `encoder`: the smaller model's encoder states; `transcript`: its transcript; `large_encoder`: the states of
        the larger.
    label : str
        Row of the tables.
    """

    technique = "decider"
    looks_at: str
    label: str

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, Any] = {}

    def forward(self, evidence: Evidence) -> torch.Tensor:
        """Return scores [batch], higher for harder utterances."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as plain data."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Router:
        """Build a router with random weights."""
        return cls(**config)
