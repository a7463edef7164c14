"""Router interface: modules that score how hard an utterance is for the smaller of two models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from efficient_asr.models.parts import Part

ROUTER_INPUTS = ("audio", "encoder", "transcript", "small_model", "large_encoder")
AFTER_SMALL = ("transcript", "small_model")  # inputs that exist when the smaller model has transcribed the audio
ENCODER_FIRST = (
    "encoder",
    "large_encoder",
)  # inputs for which an encoder runs before it is decided which model goes on
STATES_OF = {
    "encoder": "small",
    "small_model": "small",
    "large_encoder": "large",
}  # the model whose encoder states are needed


@dataclass
class RouterInput:
    """Inputs available to a router.

    Attributes
    ----------
    wavs : torch.Tensor
        [batch, time] at 16 kHz.
    lengths : torch.Tensor
        Number of unpadded samples, [batch].
    hidden_states : tuple of torch.Tensor or None
        Hidden states of the encoder that the router requires: input of the first layer and output of every layer, each [batch,
        frames, dim].
    texts : list of str
        Transcripts of the smaller model, if the router requires them.
    details : list of dict
        Details of these transcripts, such as `avg_logprob`.
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
        `audio`; `encoder`: the smaller model's encoder states; `transcript`: its transcript; `small_model`: both;
        `large_encoder`: the larger model's encoder states.
    label : str
        Row label in tables.
    threshold : float
        Utterances with a higher score go to the larger model.
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
