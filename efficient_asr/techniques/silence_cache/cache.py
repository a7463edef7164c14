r"""Silence cache: Whisper on the audio's own length, without training.

Whisper pads every utterance to 30 s, and most of its encoder's work is spent on silence. Cut away, the silence is missed: encoder
and decoder attend to it, and a plain Whisper without it repeats itself. But what lies behind an utterance is nearly the same for
all utterances, so it is computed once per model and kept. We know of no publication of this; related are shortened contexts
without anything in their place (whisper.cpp's `audio_ctx`) and training for them (FUTO, `audio_context.py`).

Let :math:`h^l_t` be the input of encoder layer :math:`l` at position :math:`t`, and :math:`s_i` the first silent position of
recording :math:`i` of a calibration set. The cache is the mean over the recordings in which a position is silent,

.. math:: c^l_t = \mathrm{mean}_{i:\, s_i \le t}\; h^{l,i}_t .

An utterance and `padding_s` of real silence fill :math:`n` positions. Layers run on these alone; their queries see their own keys
and values, and those of the cached silence, :math:`K^l c^l_t` and :math:`V^l c^l_t` for :math:`t \ge n`. Behind the last layer,
:math:`c^L_t` completes the encoder's output, so the decoder sees the whole window.

With `group` > 1, neighbouring silent positions share one key and value, the means of theirs. A group of :math:`k` positions has
the weight of all of them: :math:`\log k` is added to its attention score, which is exact if their keys are equal. Some are not
like their neighbours: the decoder pays most of its attention to silence to a few dozen positions that are the same for every
utterance (recipes/silence_cache/distances.py measures it), like the first tokens in Xiao et al., "Efficient Streaming Language
Models with Attention Sinks" (arXiv 2309.17453). A mean over a group would dilute them, so the `sinks` positions that the decoder
attends to most, averaged over layers, heads, the tokens of the prompt and the calibration recordings, stay alone, in the
self-attention of the encoder too. Unlike there, sinks are positions of an encoder, and found by measuring.

Whisper: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv 2212.04356).

Deviations from the padded model: none with 30 s of real silence, where nothing is cached and the output is the plain model's,
bit for bit. Otherwise real silence depends on the speech before it, most of all close to its end, which is what the real padding
is for; the cached one does not. An utterance's states never depend on its batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded, Tail
from efficient_asr.models.whisper.greedy import heads
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.utils.errors import UserError

CUTS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # calibration recordings are also cut to these lengths
GROUP, SINKS = 16, 64
FILE = "encoder_padding.safetensors"


class SilenceCache(OwnLength):
    """Encode each utterance on its own length; cached silence stands for the rest of the window.

    Arguments
    ---------
    padding_s : float
        Real silence behind each utterance in seconds.
    group : int
        Size of the blocks of silent positions that share one key and value; 1 keeps all.
    layers, positions, dim : int
        Shape of the cache: encoder layers, positions of the window, width of the encoder.
    fingerprint : str
        Checksum of the encoder that the cache was made from.
    sinks : sequence of int
        Positions that are in no group.
    """

    technique = "silence_cache"

    def __init__(
        self,
        padding_s: float,
        group: int,
        layers: int,
        positions: int,
        dim: int,
        fingerprint: str = "",
        sinks: Sequence[int] = (),
    ) -> None:
        super().__init__(padding_s)
        if not isinstance(group, int) or group < 1:
            raise UserError(f"group: {group!r} is not an integer of at least 1")
        self.group = self.step = group
        self.fills_window = True
        if not {*sinks} <= {*range(positions)} or len({*sinks}) < len(sinks):
            raise UserError(f"sinks: not different positions from 0 to {positions - 1}")
        self.fingerprint, self.sinks = fingerprint, sorted(sinks)
        self.register_buffer("states", torch.zeros(layers + 1, positions, dim), persistent=False)
        self._kept: dict[Any, Any] = {}  # keys and values by layer, and the tail; made when first needed, by device

    @property
    def label(self) -> str:
        """Variant, for the tables."""
        groups = f", groups of {self.group}" if self.group > 1 else ""
        groups += f" but for {len(self.sinks)}" if groups and self.sinks else ""
        return f"silence cache, {self.padding_s:g} s{groups}"

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`."""
        layers, positions, dim = self.states.shape
        return {
            "padding_s": self.padding_s, "group": self.group, "layers": layers - 1, "positions": positions, "dim": dim,
            "fingerprint": self.fingerprint,
        } | ({"sinks": self.sinks} if self.sinks else {})  # fmt: skip

    # ------------------------------------------------------------ making and keeping it

    @classmethod
    def calibrate(
        cls,
        whisper: Any,
        wavs: Iterable[torch.Tensor] | None = None,
        padding_s: float = 0.2,
        group: int = GROUP,
        language: str | None = None,
        sinks: int = SINKS,
    ) -> SilenceCache:
        """Make the cache of a model.

        Arguments
        ---------
        whisper : Whisper
            The model.
        wavs : iterable of torch.Tensor, optional
            Recordings [time] at 16 kHz, a few seconds each; None for bursts of noise, which need no data.
        padding_s, group
            See the class.
        language : str, optional
            For a model whose encoder depends on the language.
        sinks : int
            Number of positions that the decoder attends to most, which are in no group.
        """
        config = whisper.network.config
        cache = cls(padding_s, group, config.encoder_layers, config.max_source_positions, config.d_model)
        total, count = torch.zeros(cache.states.shape, dtype=torch.double), torch.zeros(config.max_source_positions)
        weight = torch.zeros(config.max_source_positions)
        some_language = language or next(iter(whisper.labels.languages), None)
        prompt = torch.tensor([whisper.labels.prompt(some_language, DecodingOptions())])
        for wav in _pieces(noise_bursts() if wavs is None else wavs, whisper.window_samples):
            with torch.no_grad(), whisper.whole_window():
                encoded = whisper.encode(wav[None], torch.tensor([len(wav)]), True, [language])
            first = int(encoder_frames(len(wav))) + 1
            count[first:] += 1
            total[:, first:] += torch.stack([h[0, first:] for h in encoded.hidden_states]).double().cpu()
            if group > 1 and sinks:
                weight[first:] += attention_to(whisper, encoded, prompt)[first:]
        if not count.max() > 0:
            raise UserError("calibration of the silence cache needs recordings shorter than the model's window")
        mean = total / count.clamp(min=1)[None, :, None]
        seen = count.nonzero().flatten()
        mean[:, : seen[0]] = mean[:, seen[0], None]  # before the shortest recording's end
        cache.states.copy_(mean)
        cache.sinks = (
            (weight / count.clamp(min=1)).topk(min(sinks, len(weight))).indices.sort().values.tolist()
            if group > 1
            else []
        )
        cache.fingerprint = encoder_fingerprint(whisper.network)
        return cache.to(whisper.device)

    def save(self, folder: Path) -> None:
        """Write the states in half precision next to the model."""
        save_file({"states": self.states.half().cpu().contiguous()}, Path(folder) / FILE)

    def load(self, folder: str, whisper: Any) -> SilenceCache:
        """Read the states from a model folder.

        Raises
        ------
        UserError
            If the file is missing or damaged, or belongs to other weights.
        """
        path = Path(folder) / FILE
        try:
            states = load_file(path)["states"]
            self.states.copy_(states)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: the silence cache cannot be read ({error}); calibrate the model again") from None
        config = whisper.network.config
        shape = (config.encoder_layers + 1, config.max_source_positions, config.d_model)
        if self.fingerprint != encoder_fingerprint(whisper.network) or self.states.shape != shape:
            raise UserError(
                f"{path}: the silence cache was made for other weights; run: efficient-asr calibrate {folder} --out FOLDER"
            )
        return self.to(whisper.device)

    def with_padding(self, padding_s: float) -> SilenceCache:
        """Return the same cache with another amount of real silence."""
        other = type(self)(**(self.to_config() | {"padding_s": padding_s}))
        other.states = self.states
        return other

    def for_weights(self, whisper: Any) -> SilenceCache:
        """Return the same cache, with the checksum of another model's encoder."""
        other = self.with_padding(self.padding_s)
        other.fingerprint = encoder_fingerprint(whisper.network)
        return other

    # ------------------------------------------------------------ what stands for the silence

    def _means(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the positions of each group, [groups, dim] of [positions, dim]."""
        return torch.stack([values[group].mean(dim=0) for group in self.groups()]) if self.group > 1 else values

    def groups(self) -> list[list[int]]:
        """Return the positions of each group: block by block of `group` positions, first what is no sink, then the sinks."""
        alone, found = set(self.sinks), []
        for start in range(0, self.states.shape[1], self.group):
            block = range(start, min(start + self.group, self.states.shape[1]))
            rest = [position for position in block if position not in alone]
            found += ([rest] if rest else []) + [[position] for position in block if position in alone]
        return found

    def silence(self, whisper: Any, layer: int, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cached keys and values [1, heads, groups, head dim] behind the shortest utterance."""
        place = layer, self.states.device, whisper.network.dtype
        if place not in self._kept:
            module = whisper.network.model.encoder.layers[layer]
            attention = module.self_attn
            states = module.self_attn_layer_norm(self.states[layer].to(whisper.network.dtype))
            pair = []
            for project in (attention.k_proj, attention.v_proj):
                values = self._means(project(states))
                pair.append(values.view(1, -1, attention.num_heads, attention.head_dim).transpose(1, 2).contiguous())
            self._kept[place] = pair
        first = self.tail(whisper).first(own)
        keys, values = self._kept[place]
        return keys[:, :, first:], values[:, :, first:]

    def complete(self, whisper: Any, layer: int, states: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return states [batch, window, dim] whose positions from `own` [batch] on are the cached ones."""
        longest = states.shape[1]
        window = self.states[layer].to(states.dtype).expand(len(states), -1, -1)
        real = torch.arange(longest, device=states.device) < own.to(states.device)[:, None]
        return torch.cat([torch.where(real[..., None], states, window[:, :longest]), window[:, longest:]], dim=1)

    def tail(self, whisper: Any) -> Tail:
        """Return the groups of the last layer's output."""
        place = "tail", self.states.device, whisper.network.dtype
        if place not in self._kept:
            states = self._means(self.states[-1].to(whisper.network.dtype))
            groups = self.groups()
            starts = torch.tensor([group[0] // self.group * self.group for group in groups])  # on the CPU, like `own`
            sizes = torch.tensor([len(group) for group in groups], device=states.device)
            self._kept[place] = Tail(states, starts, sizes.log())
        return self._kept[place]


@torch.no_grad()
def attention_to(whisper: Any, encoded: Encoded, tokens: torch.Tensor) -> torch.Tensor:
    """Return how much a model's decoder attends to each position of encoder states [1, positions, dim], [positions].

    The mean of cross-attention over layers, heads and `tokens` [1, tokens].
    """
    found: dict[tuple[int, str], torch.Tensor] = {}
    layers = whisper.network.model.decoder.layers
    handles = [
        getattr(layer.encoder_attn, name).register_forward_hook(
            lambda module, given, output, place=(i, name): found.update({place: output})
        )
        for i, layer in enumerate(layers)
        for name in ("q_proj", "k_proj")
    ]
    try:
        whisper.predict(encoded, tokens.to(whisper.device))
    finally:
        for handle in handles:
            handle.remove()
    total = torch.zeros(encoded.states.shape[1])
    for i, layer in enumerate(layers):
        queries, keys = (heads(found[i, name], layer.encoder_attn) for name in ("q_proj", "k_proj"))
        scores = (queries * layer.encoder_attn.scaling) @ keys.transpose(2, 3)
        total += scores.float().softmax(dim=-1).mean(dim=(0, 1, 2)).cpu()
    return total / len(layers)


def encoder_fingerprint(network: Any) -> str:
    """Return a checksum of the weights of a Whisper's encoder."""
    digest = hashlib.sha256()
    for name, value in sorted(network.model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def noise_bursts(count: int = 2) -> list[torch.Tensor]:
    """Return audio for calibration without data: noise whose loudness rises and falls like that of syllables, [time] each."""
    generator = torch.Generator().manual_seed(0)
    time_s = torch.arange(16 * SAMPLE_RATE) / SAMPLE_RATE
    syllables = (torch.sin(2 * math.pi * 2 * time_s) ** 2).clamp(min=0.02)
    kernel = torch.hann_window(9)[None, None] / 4  # speech has little energy at high frequencies
    wavs = []
    for _ in range(count):
        noise = torch.randn(1, 1, len(time_s), generator=generator)
        noise = nn.functional.conv1d(noise, kernel, padding=4)[0, 0]
        wavs.append(0.1 * syllables * noise)
    return wavs


def _pieces(wavs: Iterable[torch.Tensor], window: int) -> Iterable[torch.Tensor]:
    """Yield recordings that leave silence in the window, each also cut to `CUTS_S`."""
    for wav in wavs:
        ends = [round(cut * SAMPLE_RATE) for cut in CUTS_S if round(cut * SAMPLE_RATE) < len(wav)]
        for end in (*ends, len(wav)):
            if end < window - SAMPLE_RATE // 10:
                yield wav[:end]
