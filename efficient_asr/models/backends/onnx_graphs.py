"""A Whisper as three ONNX graphs.

The encoder's graph runs on the audio's own length, for one utterance: `features` [1, mels, frames] and the number of `positions`
to keep, so that one graph serves all lengths up to the window. It returns states [1, positions, dim]; what a padding puts in the
place of the rest is a constant. The second graph turns states into keys and values of cross-attention, for all decoder layers.

The decoder's graph takes tokens [batch, n], the keys and values of the tokens before, those of cross-attention, and an additive
bias for the latter, [batch, 1, 1, positions]. It returns the scores of the next token and all keys and values of the tokens.

With int8, the decoder's linear layers become `MatMulNBits` of ONNX Runtime: weights in blocks of 64 inputs with a scale each, and
activations quantised row by row in the same blocks, so that a transcript does not depend on its batch. For the many rows of an
encoder that is slower than float32, and ONNX Runtime's other kernels use one scale for all activations of a layer, which costs
words. An int8 encoder is therefore torch's (`efficient_asr.models.int8`).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from efficient_asr.models.backends import need
from efficient_asr.models.backends.base import write_own_files
from efficient_asr.models.whisper.greedy import heads
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.utils.files import atomic_write

BLOCK = 64
ENCODER, CROSS, DECODER, TAIL = "encoder.onnx", "cross.onnx", "decoder.onnx", "tail.safetensors"


class EncoderGraph(nn.Module):
    """Features and a number of positions to encoder states.

    Arguments
    ---------
    whisper : Whisper
        A plain Whisper, with or without a padding.
    """

    def __init__(self, whisper: Whisper) -> None:
        super().__init__()
        self.network, padding = whisper.network, whisper.encoder_padding
        own = torch.tensor([0])
        tail = padding.tail(whisper) if padding is not None else None
        self.starts, self.log_weights = (None, None) if tail is None else (tail.starts, tail.log_weights.float())
        layers = range(len(self.network.model.encoder.layers))
        self.silence = None if tail is None else [padding.silence(whisper, i, own) for i in layers]

    def forward(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return states [1, positions, dim]."""
        encoder = self.network.model.encoder
        x = nn.functional.gelu(encoder.conv1(features))
        x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)[:, :positions]
        x = x + encoder.embed_positions.weight[:positions]
        bias = None
        if self.log_weights is not None:
            first = (self.starts < positions).sum()
            bias = torch.cat([torch.zeros_like(x[0, :, 0]), self.log_weights[first:]])[None, None, None]
        for i, layer in enumerate(encoder.layers):
            silence = None if self.silence is None else tuple(each[:, :, first:] for each in self.silence[i])
            x = OwnLength.run_layer(layer, x, bias, silence)
        return encoder.layer_norm(x)


class CrossGraph(nn.Module):
    """Encoder states to keys and values of cross-attention.

    Arguments
    ---------
    whisper : Whisper
        A plain Whisper.
    """

    def __init__(self, whisper: Whisper) -> None:
        super().__init__()
        self.layers = whisper.network.model.decoder.layers

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return keys and values of every layer, [1, heads, positions, head dim] each, for states [1, positions, dim]."""
        attentions = [layer.encoder_attn for layer in self.layers]
        return tuple(heads(project(states), a) for a in attentions for project in (a.k_proj, a.v_proj))


class DecoderGraph(nn.Module):
    """Tokens and caches to the scores of the next token.

    Arguments
    ---------
    whisper : Whisper
        A plain Whisper.
    """

    def __init__(self, whisper: Whisper) -> None:
        super().__init__()
        self.network = whisper.network

    def forward(
        self, tokens: torch.Tensor, bias: torch.Tensor, past: list[torch.Tensor], cross: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return scores [batch, vocabulary], and keys and values of all tokens by layer, [batch, heads, tokens, head dim]."""
        decoder, kept = self.network.model.decoder, []
        start, count = past[0].shape[2], tokens.shape[1]
        places = torch.arange(start + count)
        x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[places[start:]]
        future = places[None] > places[start:, None]
        causal = torch.zeros(future.shape).masked_fill(future, -torch.inf)[None, None]
        for i, layer in enumerate(decoder.layers):
            states, attention = layer.self_attn_layer_norm(x), layer.self_attn
            pair = [
                torch.cat([past[2 * i + j], heads(project(states), attention)], dim=2)
                for j, project in enumerate((attention.k_proj, attention.v_proj))
            ]
            kept += pair
            x = x + _attend(attention, states, *pair, causal)
            states, attention = layer.encoder_attn_layer_norm(x), layer.encoder_attn
            x = x + _attend(attention, states, cross[2 * i], cross[2 * i + 1], bias)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return (self.network.proj_out(decoder.layer_norm(x[:, -1])), *kept)


def _attend(
    attention: nn.Module, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return the output of attention, written out: the exported form of torch's fused attention is slower."""
    scores = (heads(attention.q_proj(x), attention) * attention.scaling) @ keys.transpose(2, 3) + bias
    return attention.out_proj((scores.softmax(dim=-1) @ values).transpose(1, 2).reshape(x.shape))


def convert(whisper: Whisper, folder: Path, quantise: str | None = None) -> None:
    """Write a folder for the backend `onnx`.

    Arguments
    ---------
    whisper : Whisper
        The model, in float32; see `Whisper.plain`.
    folder : Path
        The folder; written atomically.
    quantise : str, optional
        `decoder-int8`, `encoder-int8` or `int8`; None for float32.

    Raises
    ------
    UserError
        If a package is missing, or the model has layers that a plain Whisper does not have.
    """
    need("onnx", "onnxruntime")
    whisper = whisper.plain()
    config = whisper.network.config
    layers, attention_heads = config.decoder_layers, config.decoder_attention_heads
    size = config.d_model // attention_heads
    names = [f"{name}_{i}" for i in range(layers) for name in ("keys", "values")]
    int8_encoder = quantise in ("encoder-int8", "int8")
    with atomic_write(Path(folder)) as partial, torch.no_grad():
        write_own_files(whisper, partial, "onnx", quantise, torch_encoder=int8_encoder)
        if not int8_encoder:
            inputs = (torch.zeros(1, config.num_mel_bins, 48), torch.tensor(20))
            axes = {"features": {2: "frames"}}
            _export(EncoderGraph(whisper), inputs, partial / ENCODER, ["features", "positions"], ["states"], axes)
        states = torch.zeros(1, 7, config.d_model)
        cross = CrossGraph(whisper)
        _export(cross, (states,), partial / CROSS, ["states"], names, {"states": {1: "positions"}})
        past, fixed = (torch.zeros(2, attention_heads, length, size) for length in (3, 7))
        inputs = (
            torch.zeros(2, 2, dtype=torch.long),
            torch.zeros(2, 1, 1, 7),
            [past] * 2 * layers,
            [fixed] * 2 * layers,
        )
        given = ["tokens", "bias", *(f"past_{name}" for name in names), *(f"cross_{name}" for name in names)]
        axes = {"tokens": {0: "batch", 1: "new"}, "bias": {0: "batch", 3: "positions"}}
        axes |= {name: {0: "batch", 2: name.split("_")[0]} for name in given[2:]}
        returned = ["scores", *(f"own_{name}" for name in names)]
        int8 = quantise in ("decoder-int8", "int8")
        _export(DecoderGraph(whisper), inputs, partial / DECODER, given, returned, axes, int8)
        padding = whisper.encoder_padding
        tail = padding.tail(whisper) if padding is not None else None
        if tail is not None:
            pairs = torch.stack([pair[0] for pair in cross(tail.states[None])])
            about = {"log_weights": tail.log_weights.float(), "starts": tail.starts}
            save_file({"cross": pairs} | about, partial / TAIL)


def _export(
    graph: nn.Module, inputs: tuple[Any, ...], path: Path, names: list[str], outputs: list[str], axes: dict[str, dict[int, str]],
    int8: bool = False,
) -> None:  # fmt: skip
    """Write a graph as an ONNX file."""
    with warnings.catch_warnings():
        # The exporter that traces is deprecated; setup.py limits torch's version. Its successor needs a release of onnxscript
        # for each release of torch, and takes ten times as long.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(), inputs, path, input_names=names, output_names=outputs, opset_version=18, dynamo=False,
            dynamic_axes=axes,
        )  # fmt: skip
    if int8:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
        quantiser = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantiser.process()
        onnx.save(quantiser.model.model, path)
