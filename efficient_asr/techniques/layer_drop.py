r"""LayerDrop at test time: skip layers at random during inference.

Zaiem, Algayres, Parcollet, Essid, Ravanelli: "Fine-tuning Strategies for Faster Inference using Speech Self-Supervised
Models: A Comparative Study" (arXiv 2303.06740), after Fan, Grave, Joulin: "Reducing Transformer Depth on Demand with Structured
Dropout" (arXiv 1909.11556): with :math:`b_l \sim \mathrm{Bernoulli}(1 - p)`,

.. math:: h_l = b_l \, f_l(h_{l-1}) + (1 - b_l) \, h_{l-1},

so that :math:`(1 - p) L` layers are computed on average. At :math:`p = 0` (`test_layerdrop: 0`) this is the identity.

Deviations from the paper: the paper draws once per batch. Here layers are drawn per utterance, from a generator seeded with
`test_layerdrop_seed` and the utterance's number of samples, so a transcript does not depend on the rest of the batch, the order
of utterances, or earlier computations. Utterances of the same length skip the same layers. WavLM's first layer is never dropped,
as in its original implementation, because it computes the position bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from efficient_asr.models.encoders.base import Encoder, EncoderOutput, EncoderState
from efficient_asr.models.parts import build, describe
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="layer_drop",
    parts={"layer_drop": ":LayerDrop"},
    former_names={"techniques.layer_drop.LayerDrop": "layer_drop"},
    keys=(Key("test_layerdrop", 0.0, 0.99, eval_only=True), Key("test_layerdrop_seed", least=0, eval_only=True)),
)


class LayerDrop(Encoder):
    """An encoder that also skips layers at random in evaluation.

    Arguments
    ---------
    encoder : Encoder
        The trained encoder.
    probability : float
        Probability that a layer is skipped, in [0, 1).
    seed : int
        Seed of the draws.

    Raises
    ------
    UserError
        If `probability` is not in [0, 1).
    """

    technique = "layer_drop"

    def __init__(self, encoder: Encoder, probability: float, seed: int = 0) -> None:
        super().__init__()
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability < 1:
            raise UserError(f"test_layerdrop: expected a probability in [0, 1), got {probability!r}")
        self.encoder, self.probability, self.seed = encoder, probability, seed
        self.hidden_size, self.output_norm = encoder.hidden_size, encoder.output_norm
        self.layerdrop, self.first_droppable_layer = encoder.layerdrop, encoder.first_droppable_layer
        self.train(encoder.training)

    @property
    def is_identity(self) -> bool:
        """Whether no layer is ever skipped."""
        return not self.probability

    @property
    def label(self) -> str:
        """Label with the probability."""
        return f"layerdrop {self.probability:g}"

    @property
    def longest_s(self) -> float:
        """Longest audio that the encoder takes, in seconds."""
        return self.encoder.longest_s

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The transformer layers."""
        return self.encoder.layers

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of frames [batch] for a number of samples [batch]."""
        return self.encoder.frame_lengths(lengths)

    def begin(self, wavs: torch.Tensor, lengths: torch.Tensor) -> EncoderState:
        """Compute the input of the first layer."""
        return self.encoder.begin(wavs, lengths)

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """Run one layer."""
        return self.encoder.run_layer(index, state)

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the modules that follow the last layer."""
        return self.encoder.finish(states)

    def draw(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the layers to compute, boolean [batch, layers], for utterances with `lengths` samples [batch]."""
        numbers = [np.random.default_rng([self.seed, n]).random(self.num_layers) for n in lengths.tolist()]
        drawn = torch.from_numpy(np.stack(numbers) >= self.probability)
        drawn[:, : self.first_droppable_layer] = True
        return drawn

    def forward(self, wavs: torch.Tensor, lengths: torch.Tensor, output_hidden_states: bool = False) -> EncoderOutput:
        """Encode a batch, see `Encoder.forward`; each layer runs only on the utterances that do not skip it."""
        if self.training or not self.probability:
            return super().forward(wavs, lengths, output_hidden_states)
        state, drawn = self.begin(wavs, lengths), self.draw(lengths)
        hidden_states = [state.states]
        for index in range(self.num_layers):
            state = self._run_some(index, state, drawn[:, index].to(state.states.device))
            hidden_states.append(state.states)
        states = self.end(state)
        return EncoderOutput(states, state.frame_lengths, tuple(hidden_states) if output_hidden_states else None)

    def _run_some(self, index: int, state: EncoderState, chosen: torch.Tensor) -> EncoderState:
        """Run a layer on the `chosen` utterances, boolean [batch]."""
        if bool(chosen.all()):
            return self.run_layer(index, state)
        if not bool(chosen.any()):
            return state
        rows = chosen.nonzero()[:, 0]
        part = self.run_layer(index, state.select(rows)).states
        states = state.states.clone()
        states[rows, : part.shape[1]] = part
        return replace(state, states=states)

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the encoder as its config entry."""
        return {"encoder": describe(self.encoder), "probability": self.probability, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerDrop:
        """Build the network from a `to_config` dict, with random weights."""
        return cls(build(config["encoder"], "the encoder of LayerDrop"), config["probability"], config["seed"])
