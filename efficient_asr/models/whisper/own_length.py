"""Encode each utterance on its own length instead of Whisper's window of 30 s.

An utterance of n samples and `padding_s` of silence behind it fill the first positions of the window; the convolutions and layers
run on these positions only. In a batch, every utterance has its own number of positions. On a CPU, which gains nothing from
larger matrices, utterances are encoded one by one, so states do not depend on the batch, bit for bit; elsewhere they are encoded
together, and attention does not see the positions of longer ones.

`OwnLength` alone cuts the rest of the window away, which a model must have been trained for: a plain Whisper repeats itself
without the silence. Techniques that put something in its place override `silence`, `complete` and `tail`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.log_mel import HOP, encoder_frames
from efficient_asr.models.parts import Part, build
from efficient_asr.models.whisper.decoding import Encoded, Tail, attention_bias
from efficient_asr.utils.errors import UserError

POSITIONS_PER_S = SAMPLE_RATE / HOP / 2


class OwnLength(Part):
    """Encode each utterance with a given amount of silence behind it.

    Arguments
    ---------
    padding_s : float
        Silence behind each utterance in seconds. With 30 or more, the whole window is encoded: the plain model, bit for bit.

    Attributes
    ----------
    step : int
        The number of positions of an utterance is a multiple of this.
    fills_window : bool
        Whether there are states of the whole window, whatever the length of the audio.
    """

    def __init__(self, padding_s: float) -> None:
        super().__init__()
        if not isinstance(padding_s, (int, float)) or not 0 <= padding_s < math.inf:
            raise UserError(f"padding_s: {padding_s!r} is not a number of seconds, 0 or more")
        self.padding_s = padding_s
        self.step = 1
        self.fills_window = padding_s >= 30
        self.together: bool | None = None  # encode a batch together; None to decide by device

    @property
    def label(self) -> str:
        """Variant, for the tables."""
        return f"own length + {self.padding_s:g} s"

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`."""
        return {"padding_s": self.padding_s}

    def save(self, folder: Path) -> None:
        """Write tensors next to the model; there are none."""

    @staticmethod
    def stored(entry: dict[str, Any], folder: str, whisper: Any) -> OwnLength:
        """Return the padding of a model folder from its entry in config.json.

        Raises
        ------
        UserError
            If the entry is not a padding, or its tensors cannot be read.
        """
        part = build(entry, f"{folder}/config.json, encoder_padding")
        if not isinstance(part, OwnLength):
            raise UserError(
                f"{folder}/config.json: encoder_padding is not a padding; the folder is damaged or cannot be trusted"
            )
        return part.load(folder, whisper)

    def load(self, folder: str, whisper: Any) -> OwnLength:
        """Read tensors from a model folder; return the part itself."""
        return self

    def with_padding(self, padding_s: float) -> OwnLength:
        """Return the same with another amount of silence."""
        return type(self)(padding_s)

    def for_weights(self, whisper: Any) -> OwnLength:
        """Return the padding for a model that computes the same with other weights, such as one with merged adapters."""
        return self

    def positions(self, whisper: Any, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of positions to compute for utterances of `lengths` samples [batch]."""
        needed = encoder_frames(lengths.cpu()) + round(self.padding_s * POSITIONS_PER_S)
        needed = torch.ceil(needed.clamp(min=1) / self.step).long() * self.step
        return needed.clamp(max=whisper.network.config.max_source_positions)

    def encode(self, whisper: Any, wavs: torch.Tensor, lengths: torch.Tensor, hidden_states: bool) -> Encoded:
        """Run the encoder on [batch, time] at 16 kHz with `lengths` [batch] in samples; see `Whisper.encode`."""
        network = whisper.network.model.encoder
        window, own = network.config.max_source_positions, self.positions(whisper, lengths)
        together = whisper.device.type != "cpu" or not whisper.encodes_alone if self.together is None else self.together
        if int(own.min()) == window:
            out = network(whisper.features(wavs, lengths), output_hidden_states=hidden_states)
            return Encoded(out.last_hidden_state, lengths, out.hidden_states if hidden_states else None)
        size = len(wavs) if together else 1
        parts = [slice(row, row + size) for row in range(0, len(wavs), size)]
        found = [
            self._layers(whisper, wavs[part, : max(1, int(lengths[part].max()))], lengths[part], own[part])
            for part in parts
        ]
        last, longest = len(network.layers), int(own.max())
        states = tuple(
            self.complete(whisper, layer, _stack([part[layer] for part in found], longest), own)
            for layer in (range(last + 1) if hidden_states else [last])
        )
        return Encoded(states[-1], lengths, states if hidden_states else None, own=own, tail=self.tail(whisper))

    def _layers(self, whisper: Any, wavs: torch.Tensor, lengths: torch.Tensor, own: torch.Tensor) -> list[torch.Tensor]:
        """Return the inputs of all layers and the output of the last, each [batch, longest, dim]."""
        network = whisper.network.model.encoder
        window, longest = network.config.max_source_positions, int(own.max())
        # one more position than needed: the last one sees the padding behind it
        features = whisper.features(wavs, lengths, min(window, longest + 1) * 2)
        x = nn.functional.gelu(network.conv1(features))
        x = nn.functional.gelu(network.conv2(x)).transpose(1, 2)[:, :longest] + network.embed_positions.weight[:longest]
        bias = attention_bias(own, self.tail(whisper), x)
        found = []
        for i, layer in enumerate(network.layers):
            found.append(x)
            x = self.run_layer(layer, x, bias, self.silence(whisper, i, own))
        return [*found, network.layer_norm(x)]

    @classmethod
    def run_layer(
        cls,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        silence: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the output of an encoder layer for [batch, positions, dim]; see `attention_bias` and `silence`."""
        x = x + cls._attend(layer, layer.self_attn_layer_norm(x), bias, silence)
        return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))

    @staticmethod
    def _attend(
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        silence: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the output of self-attention over [batch, positions, dim] and the keys and values of silence."""
        attention = layer.self_attn
        shape = (*x.shape[:2], attention.num_heads, attention.head_dim)
        queries = (attention.q_proj(x) * attention.scaling).view(shape).transpose(1, 2)
        pair = [project(x).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj)]
        if silence is not None:
            pair = [
                torch.cat([one, end.expand(len(x), -1, -1, -1)], dim=2) for one, end in zip(pair, silence, strict=True)
            ]
        found = nn.functional.scaled_dot_product_attention(queries, *pair, attn_mask=bias, scale=1.0)
        return attention.out_proj(found.transpose(1, 2).reshape(x.shape))

    # ------------------------------------------------------------ for techniques

    def silence(self, whisper: Any, layer: int, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return keys and values [1, heads, groups, head dim] that every utterance attends to in a layer."""

    def complete(self, whisper: Any, layer: int, states: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the input of a layer (or the output of the last) [batch, positions, dim] with what stands for the rest."""
        return states

    def tail(self, whisper: Any) -> Tail | None:
        """Return what stands for the positions that were not computed; `silence` has its groups in every layer."""


def _stack(parts: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Return states of parts of a batch, [rows, positions, dim] each, as one batch padded with zeros."""
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
