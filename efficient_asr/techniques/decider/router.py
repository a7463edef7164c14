"""The interface of routers: modules that look at something and say how hard an utterance is for the smaller of two models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from efficient_asr.models.parts import Part

ROUTER_INPUTS = ("audio", "encoder", "transcript", "large_encoder")


@dataclass
class RouterInput:
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


class Router(Part):
    """Base class of routers.

    Attributes
    ----------
    router_input : str
        `audio`; `encoder`: the smaller model's encoder states; `transcript`: its transcript; `large_encoder`: the states of
        the larger.
    label : str
        Row of the tables.
    threshold : float
        Utterances that score higher go to the larger model.
    """

    technique = "decider"
    router_input: str
    label: str
    threshold: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, Any] = {}

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return scores [batch], higher for harder utterances."""
        raise NotImplementedError
