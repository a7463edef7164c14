"""OnnxWhisper: a Whisper that runs in ONNX Runtime. Its graphs are described in `onnx_graphs.py`.

The loop over tokens, the rules of decoding and the fallback are those of any other Whisper of this package. Each utterance is
encoded alone. In a batch, keys and values of cross-attention are padded to a multiple of 64 positions and masked: the order of
all sums, and with it every bit, is that of a batch of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file

from efficient_asr.models.backends.base import ConvertedWhisper
from efficient_asr.models.backends.onnx_graphs import CROSS, DECODER, ENCODER, TAIL
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded
from efficient_asr.models.whisper.greedy import Found
from efficient_asr.utils.errors import UserError

MULTIPLE = 64  # positions of cross-attention


class OnnxWhisper(ConvertedWhisper):
    """A Whisper in ONNX Runtime, on the CPU."""

    backend = "onnx"

    def load_engine(self) -> OnnxWhisper:
        """Open the graphs.

        Raises
        ------
        UserError
            If a file is missing or damaged.
        """
        names = (CROSS, DECODER) if self.torch_encoder else (ENCODER, CROSS, DECODER)
        try:
            self.sessions = {name: open_session(self.folder / name) for name in names}
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            raise UserError(f"{self.folder}: {str(error).splitlines()[0]}; convert the model again") from None
        path = self.folder / TAIL
        self.silence = {key: value.numpy() for key, value in load_file(path).items()} if path.is_file() else None
        if self.silence is not None and "size" in self.silence:  # as written before groups could differ in size
            self.silence["starts"] = np.arange(len(self.silence["log_weights"])) * int(self.silence["size"])
        return self

    def encode_one(self, wavs: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
        """Return states [count, dim]; the convolutions see the features behind the last position."""
        features = self.features(wavs, lengths, min(self.network.config.max_source_positions, count + 1) * 2)
        feed = {"features": features.numpy(), "positions": np.array(count)}
        return torch.from_numpy(self.sessions[ENCODER].run(None, feed)[0][0])

    def decoder(self, encoded: Encoded, room: int) -> OnnxDecoder:
        """Return the decoder for encoder states."""
        return OnnxDecoder(self, encoded)

    def predict(
        self, encoded: Encoded, tokens: torch.Tensor, token_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits after `tokens` [batch, 1], [batch, 1, vocabulary].

        Raises
        ------
        UserError
            For more than one token: the graph returns the scores after the last one only.
        """
        if tokens.shape[1] > 1:
            raise UserError(
                f"{self.folder}: the backend onnx gives the scores of the next token only; use the original model"
            )
        return self.decoder(encoded, tokens.shape[1]).step(tokens)

    def generate(
        self, encoded: Encoded, prompt: torch.Tensor, limits: torch.Tensor, options: DecodingOptions, temperature: float
    ) -> Found | None:
        """Refuse beam search; return None for the greedy search of this package.

        Raises
        ------
        UserError
            If beams are requested.
        """
        if options.num_beams > 1 and temperature == 0:
            raise UserError("num_beams: the backend onnx decodes greedily; use the backend torch or ctranslate2")


class OnnxDecoder:
    """The decoder for one batch.

    Arguments
    ---------
    model : OnnxWhisper
        The model.
    encoded : Encoded
        Output of `OnnxWhisper.encode`.
    """

    def __init__(self, model: OnnxWhisper, encoded: Encoded) -> None:
        config, self.session = model.network.config, model.sessions[DECODER]
        self.vocab_size, batch = config.vocab_size, len(encoded.states)
        size = config.d_model // config.decoder_attention_heads
        empty = np.zeros((batch, config.decoder_attention_heads, 0, size), dtype=np.float32)
        self.outputs = [output.name for output in self.session.get_outputs()]
        own = [name for name in self.outputs if name.startswith("own_")]
        self.past = {f"past_{name[4:]}": empty for name in own}
        self.fixed = _memory(model, encoded, [f"cross_{name[4:]}" for name in own])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [batch, n]; return the scores of the next one, [batch, 1, vocabulary]."""
        feed = {"tokens": tokens.numpy(), **self.past, **self.fixed}
        scores, *new = self.session.run(self.outputs, feed)
        self.past = dict(zip(self.past, new, strict=True))
        return torch.from_numpy(scores)[:, None]


def _memory(model: OnnxWhisper, encoded: Encoded, names: list[str]) -> dict[str, np.ndarray]:
    """Return what cross-attention sees: keys and values by name, [batch, heads, positions, head dim], and the scores' bias."""
    rows, biases, silence = [], [], model.silence
    for row, states in enumerate(encoded.states):
        count = len(states) if encoded.own is None else int(encoded.own[row])
        pairs = [pair[0] for pair in model.sessions[CROSS].run(None, {"states": states[None, :count].numpy()})]
        bias = [np.zeros(count, dtype=np.float32)]
        if silence is not None and encoded.own is not None:
            first = int((silence["starts"] < count).sum())
            bias.append(silence["log_weights"][first:])
            ends = silence["cross"][:, :, first:]
            pairs = [np.concatenate(pair, axis=1) for pair in zip(pairs, ends, strict=True)]
        rows.append(pairs)
        biases.append(np.concatenate(bias))
    longest = -(-max(len(bias) for bias in biases) // MULTIPLE) * MULTIPLE
    heads, _, size = rows[0][0].shape
    memory: dict[str, np.ndarray] = {"bias": np.full((len(rows), 1, 1, longest), -np.inf, dtype=np.float32)}
    memory |= {name: np.zeros((len(rows), heads, longest, size), dtype=np.float32) for name in names}
    for row, (pairs, bias) in enumerate(zip(rows, biases, strict=True)):
        memory["bias"][row, 0, 0, : len(bias)] = bias
        for name, values in zip(names, pairs, strict=True):
            memory[name][row, :, : len(bias)] = values
    return memory


def open_session(path: Any) -> onnxruntime.InferenceSession:
    """Open a graph with as many threads as torch uses.

    They sleep between runs: spinning, they would take the processor from torch's threads, and the other way round.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
