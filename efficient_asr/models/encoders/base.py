"""The common interface of all encoders: front end, individual layers, final norm.

Techniques work on individual layers, so an encoder exposes them: `begin` computes the input of the first layer, `run_layer`
runs one layer, and `finish` applies the operations after the last layer. `forward` is just this loop. Padding is masked
everywhere, so that an utterance's states do not depend on the rest of its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from efficient_asr.data import frame_mask
from efficient_asr.models.parts import Part


@dataclass
class EncoderState:
    """State passed from layer to layer.

    Attributes
    ----------
    states : torch.Tensor
        [batch, frames, dim].
    frame_lengths : torch.Tensor
        Number of unpadded frames of each utterance, [batch].
    mask : torch.Tensor or None
        Attention mask in the form that the layers expect; None if nothing is padded.
    position_bias : torch.Tensor or None
        WavLM's relative position bias, computed by its first layer.
    """

    states: torch.Tensor
    frame_lengths: torch.Tensor
    mask: torch.Tensor | None = None
    position_bias: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> EncoderState:
        """Return the state of selected utterances (indices [n]), truncated to the longest of them."""
        frame_lengths = self.frame_lengths[rows]
        frames = max(1, int(frame_lengths.max()))
        mask = self.mask
        if mask is not None:  # [batch, frames], or [batch, 1, frames, frames]
            mask = mask[rows][..., :frames] if mask.dim() == 2 else mask[rows][..., :frames, :frames]
            mask = None if bool((frame_lengths == frames).all()) else mask
        bias = self.position_bias
        if bias is not None:  # [batch * heads, frames, frames]
            bias = bias.unflatten(0, (len(self.states), -1))[rows][..., :frames, :frames].flatten(0, 1)
        return EncoderState(self.states[rows, :frames], frame_lengths, mask, bias)


@dataclass
class EncoderOutput:
    """Output of an encoder.

    Attributes
    ----------
    states : torch.Tensor
        [batch, frames, dim], zero past the end of each utterance.
    frame_lengths : torch.Tensor
        Number of unpadded frames of each utterance, [batch].
    hidden_states : tuple of torch.Tensor or None
        If requested: the input of the first layer and the output of every layer, each [batch, frames, dim], before
        the final layer norm.
    """

    states: torch.Tensor
    frame_lengths: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


def masked_layer_norm(states: torch.Tensor, frame_lengths: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Normalise each utterance over its unpadded frames and all dimensions; [batch, frames, dim], padding becomes zero.

    This is the papers' `output_norm` (`F.layer_norm(states, states.shape[1:])` at batch 1), without its dependence on
    padding.
    """
    mask = frame_mask(frame_lengths, states.shape[1])[:, :, None]
    count = mask.sum(dim=(1, 2), keepdim=True) * states.shape[2]
    mean = (states * mask).sum(dim=(1, 2), keepdim=True) / count
    centred = (states - mean) * mask
    variance = centred.pow(2).sum(dim=(1, 2), keepdim=True) / count
    return centred / torch.sqrt(variance + eps)


class Encoder(Part):
    """Base class of all encoders.

    Attributes
    ----------
    hidden_size : int
        Dimension of the states.
    layers : torch.nn.ModuleList
        The transformer layers.
    output_norm : bool
        Whether the final states are normalised per utterance.
    """

    hidden_size: int
    layers: nn.ModuleList
    output_norm: bool
    longest_s: float = math.inf  # longest audio that has positions
    layerdrop: float = 0.0
    first_droppable_layer: int = 0

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of frames for the given numbers of samples; both [batch], integers."""
        raise NotImplementedError

    def begin(self, wavs: torch.Tensor, lengths: torch.Tensor) -> EncoderState:
        """Compute the input of the first layer from `wavs` [batch, time] with `lengths` [batch] in samples."""
        raise NotImplementedError

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """Run one layer."""
        raise NotImplementedError

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the operation after the last layer (a layer norm, or nothing) to [batch, frames, dim]."""
        raise NotImplementedError

    def mask(self, states: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor | None:
        """Return the attention mask of the layers for states [batch, frames, dim]; None if nothing is padded."""
        return attention_mask(self.model.config, states, frame_lengths)

    def after_layers(self) -> list[nn.Parameter]:
        """Return the parameters of `finish`."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.layers)

    def forward(self, wavs: torch.Tensor, lengths: torch.Tensor, output_hidden_states: bool = False) -> EncoderOutput:
        """Encode a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time], 16 kHz (or downsampled by a technique), zero past the end of each utterance.
        lengths : torch.Tensor
            Number of unpadded samples of each utterance, [batch].
        output_hidden_states : bool
            Whether to return the states before the first layer and after every layer.
        """
        state = self.begin(wavs, lengths)
        hidden_states = [state.states]
        for index in range(self.num_layers):
            droppable = self.training and self.layerdrop > 0 and index >= self.first_droppable_layer
            if not (droppable and torch.rand(()) < self.layerdrop):
                state = self.run_layer(index, state)
            if output_hidden_states:
                hidden_states.append(state.states)
        states = self.end(state)
        return EncoderOutput(states, state.frame_lengths, tuple(hidden_states) if output_hidden_states else None)

    def end(self, state: EncoderState) -> torch.Tensor:
        """Return the encoder's output [batch, frames, dim] as if this were the state after the last layer."""
        states = self.finish(state.states)
        if self.output_norm:
            return masked_layer_norm(states, state.frame_lengths)
        return states * frame_mask(state.frame_lengths, states.shape[1])[:, :, None]


class Continued(Encoder):
    """An encoder whose lowest layers have been run already: it continues from their state, whatever the waveforms are.

    Arguments
    ---------
    encoder : Encoder
        The encoder.
    state : EncoderState
        The state after the layers that have been run.
    layers_done : int
        Number of these layers.
    """

    def __init__(self, encoder: Encoder, state: EncoderState, layers_done: int) -> None:
        super().__init__()
        self.encoder, self.state, self.layers_done = encoder, state, layers_done
        self.train(encoder.training)
        self.output_norm, self.layerdrop, self.layers = encoder.output_norm, encoder.layerdrop, encoder.layers
        self.longest_s = encoder.longest_s
        self.first_droppable_layer = max(encoder.first_droppable_layer, layers_done)

    def begin(self, wavs: torch.Tensor, lengths: torch.Tensor) -> EncoderState:
        """Return the given state."""
        return self.state

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """Run one layer, unless it has been run already."""
        return state if index < self.layers_done else self.encoder.run_layer(index, state)

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the encoder's operation after the last layer."""
        return self.encoder.finish(states)


def plain_network_config(network: Any, model_types: tuple[str, ...]) -> dict[str, Any]:
    """Return a network's configuration without keys that could make transformers fetch or run external code.

    Raises
    ------
    ValueError
        If its type is not one of `model_types`.
    """
    if not isinstance(network, dict) or network.get("model_type") not in model_types:
        raise ValueError(f"the network's model_type is not one of {', '.join(model_types)}")
    foreign = (
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "quantization_config",
    )
    return {key: value for key, value in network.items() if key not in foreign}


def attention_mask(config: PretrainedConfig, states: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor | None:
    """Return transformers' mask for the attention implementation of `config`; None if nothing is padded."""
    if bool((frame_lengths == states.shape[1]).all()):
        return None
    mask = frame_mask(frame_lengths, states.shape[1])
    return create_bidirectional_mask(config=config, inputs_embeds=states, attention_mask=mask)


def advance(state: EncoderState, states: torch.Tensor, **changes: Any) -> EncoderState:
    """Return the state after a layer."""
    return replace(state, states=states, **changes)
