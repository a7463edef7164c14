r"""Decider: a small network that predicts whether an utterance is too hard for the smaller of two recognisers.

Malard, Zaiem, Algayres: "Big model only for hard audios: Sample dependent Whisper model selection for efficient inferences"
(arXiv 2309.12712). The encoder states :math:`h_0, \dots, h_L` (input of the first layer and output of each) are summed with
learned weights, passed through three residual blocks of one-dimensional convolutions, and averaged over time:

.. math::
    z = \sum_{l=0}^{L} w_l \, h_l, \qquad
    p(\mathrm{large}) = \sigma\left(a^\top \frac{1}{T'} \sum_t \mathrm{blocks}(z)_t + b\right).

A block is conv(3, stride s)-batch norm-ReLU-conv(3)-batch norm, plus a shortcut conv(1, stride s)-batch norm, then ReLU; channels
[256, 256, 256], strides [2, 3, 3], weights :math:`w_l` drawn from [0, 1) and not normalised. On Whisper small this takes 1.905 M
parameters and about 0.89 GMACs for 30 s. The target is 1 if the smaller model makes more errors than the larger one (ties go to
the smaller), and the loss is binary cross-entropy. Utterances with a score above a threshold go to the larger model.

The paper uses the encoder states of the **large** model, so the cost of its encoder is always incurred. With a modern decoder
the encoder dominates the cost, and hardly anything is saved. The same network on the **small** model's states
(`router_input: encoder`), or a lighter one on log-mel features, avoids this cost. So do rules without training, and learned
routers on the confidence of the small model in its own transcript (`router_input: transcript`), or on this and its encoder
states together (`router_input: small_model`).

Deviations; each of the first three is a setting whose other value is the paper's:

- `frames: unpadded` uses only the frames of the audio, masked in every block and in the average, instead of the window padded to
  30 s (`padded`, the paper's value). Short utterances cost a tenth, and the average covers only speech.
- `target: gain` predicts how many fewer errors the larger model makes (smooth L1 loss) instead of whether it makes fewer
  (`label`). Routing mistakes are thus weighted by the errors they cause.
- `balance: True` weights hard utterances by the ratio of easy to hard ones.
- Checkpoints are selected by the area under the ROC curve; the paper's code takes the argmax of a single number, which is
  always 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE, frame_mask
from efficient_asr.evaluation.wer import repeated_ngrams
from efficient_asr.models.log_mel import HOP, LogMel, encoder_frames
from efficient_asr.models.whisper.decoding import compression_ratio
from efficient_asr.techniques.decider.router import ROUTER_INPUTS, Router, RouterInput
from efficient_asr.utils.errors import UserError, did_you_mean


class MaskedBatchNorm(nn.Module):
    """Batch norm with statistics over unpadded frames only; with fewer than two such frames it uses the running statistics.

    Otherwise it equals `torch.nn.BatchNorm1d` and has the same parameter names. (Under torchrun each process uses the
    statistics of its own batch; torch's `SyncBatchNorm` supports neither masks nor CPUs.)

    Arguments
    ---------
    channels : int
        Number of channels.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalise [batch, channels, frames]; `mask` [batch, 1, frames] is True for unpadded frames."""
        x = x.to(self.running_mean.dtype)  # under autocast, convolutions return half precision
        mean, variance, count = self.running_mean, self.running_var, int(mask.sum())
        if self.training and count > 1:
            mean = (x * mask).sum(dim=(0, 2)) / count
            variance = ((x - mean[:, None]) * mask).pow(2).sum(dim=(0, 2)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight / torch.sqrt(variance + self.eps)
        return x * scale[:, None] + (self.bias - mean * scale)[:, None]


class ResidualBlock(nn.Module):
    """Two convolutions of width 3 and a shortcut, each with batch norm.

    Arguments
    ---------
    inputs, outputs : int
        Number of input and output channels.
    stride : int
        Stride of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = MaskedBatchNorm(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = MaskedBatchNorm(outputs)
        self.shortcut, self.shortcut_norm = nn.Conv1d(inputs, outputs, 1, stride, bias=False), MaskedBatchNorm(outputs)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [batch, inputs, frames] with lengths [batch] to [batch, outputs, frames / stride], zero past each length."""
        lengths = (lengths - 1) // self.stride + 1
        inner = self.conv1(x)
        mask = frame_mask(lengths, inner.shape[2])[:, None]
        inner = torch.relu(self.norm1(inner, mask)) * mask
        inner = self.norm2(self.conv2(inner), mask)
        return torch.relu(inner + self.shortcut_norm(self.shortcut(x), mask)) * mask, lengths


class Decider(Router):
    """The paper's network on the states of an encoder.

    Arguments
    ---------
    states : int
        Number of states: encoder layers plus one.
    input_size : int
        Dimension of the states.
    channels, strides : list of int
        Channels and strides of the residual blocks.
    router_input : str
        `large_encoder` (the paper), or `encoder` for the encoder of the smaller model.
    frames : str
        `padded` (the paper) or `unpadded`.
    """

    def __init__(
        self,
        states: int,
        input_size: int,
        channels: tuple[int, ...] | list[int] = (256, 256, 256),
        strides: tuple[int, ...] | list[int] = (2, 3, 3),
        router_input: str = "large_encoder",
        frames: str = "padded",
    ) -> None:
        super().__init__()
        if router_input not in ROUTER_INPUTS:
            raise UserError(f"router_input: unknown input '{router_input}'.{did_you_mean(router_input, ROUTER_INPUTS)}")
        if frames not in ("padded", "unpadded"):
            raise UserError(f"frames: '{frames}' is not padded or unpadded")
        if len(channels) != len(strides) or not channels or min(*channels, *strides) < 1:
            raise UserError(
                f"channels {list(channels)} and strides {list(strides)} must be equally long lists of positive numbers"
            )
        self.config = {
            "states": states, "input_size": input_size, "channels": list(channels), "strides": list(strides),
            "router_input": router_input, "frames": frames,
        }  # fmt: skip
        self.router_input, self.frames = router_input, frames
        self.weights = nn.Parameter(torch.rand(states))
        sizes = [input_size, *channels]
        self.blocks = nn.ModuleList(map(ResidualBlock, sizes, sizes[1:], strides))
        self.linear = nn.Linear(sizes[-1], 1)

    @property
    def label(self) -> str:
        """Row label in tables."""
        names = {"large_encoder": "decider, large encoder first", "encoder": "decider on small encoder"}
        return names.get(self.router_input, f"decider on {self.router_input}")

    def judge(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return logits [batch] for `x` [batch, dim, frames], which is zero past `lengths` [batch]."""
        for block in self.blocks:
            x, lengths = block(x, lengths)
        return self.linear(x.sum(dim=2) / lengths[:, None]).squeeze(1)

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return logits [batch]."""
        frames = inputs.hidden_states[0].shape[1]
        lengths = torch.full_like(inputs.lengths, frames)
        if self.frames == "unpadded":
            lengths = encoder_frames(inputs.lengths).clamp(1, frames)
            frames = int(lengths.max())
        # summed one by one: stacking the states would double their memory
        mixed = sum(weight * h[:, :frames] for weight, h in zip(self.weights, inputs.hidden_states, strict=True))
        mixed = mixed.transpose(1, 2)
        return self.judge(mixed * frame_mask(lengths, frames)[:, None], lengths)

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.config


class LogMelDecider(Decider):
    """The same network on log-mel features of the audio; it decides before any recogniser runs.

    Arguments
    ---------
    n_mels : int
        Number of mel bands.
    channels, strides : list of int
        Channels and strides of the residual blocks.
    """

    def __init__(
        self,
        n_mels: int = 80,
        channels: tuple[int, ...] | list[int] = (96, 96, 96),
        strides: tuple[int, ...] | list[int] = (2, 3, 3),
    ) -> None:
        super().__init__(1, n_mels, channels, strides, router_input="audio", frames="unpadded")
        self.config = {"n_mels": n_mels, "channels": list(channels), "strides": list(strides)}
        self.log_mel = LogMel(n_mels)

    @property
    def label(self) -> str:
        """Row label in tables."""
        return "decider on log-mel"

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return logits [batch]."""
        features = self.log_mel(inputs.wavs, inputs.lengths)
        return self.judge(features * self.weights, (inputs.lengths // HOP).clamp(min=1))


class TranscriptDecider(Router):
    """A learned confidence: a small network on the statistics of the smaller model's own transcript.

    Arguments
    ---------
    width : int
        Width of the single hidden layer.
    """

    router_input, label = "transcript", "decider on transcript"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.norm = MaskedBatchNorm(7)
        self.layers = nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return logits [batch]."""
        return self.layers(normalised(self.norm, transcript_statistics(inputs, self.norm.weight.device))).squeeze(1)

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"width": self.width}


def reported(inputs: RouterInput, *names: str) -> torch.Tensor:
    """Return what the smaller model reports of its transcripts, [names, batch].

    Raises
    ------
    UserError
        If it does not report one of them.
    """
    numbers = [[details.get(name) for name in names] for details in inputs.details]
    if any(None in row for row in numbers):
        raise UserError(
            f"a decider on transcripts needs a smaller model that reports {', '.join(names)}; use a Whisper with the backend "
            "torch or onnx; if the records are older, delete them and run recipes/decider/label.py again"
        )
    return torch.tensor(numbers, dtype=torch.float32).T


def transcript_statistics(inputs: RouterInput, device: torch.device) -> torch.Tensor:
    """Return seven statistics of the smaller model's transcripts, [batch, 7]: its confidence, lengths and repetition."""
    logprob, entropy, tokens = reported(inputs, "avg_logprob", "entropy", "tokens").to(device)
    ratio = torch.tensor([compression_ratio(text) for text in inputs.texts], device=device)
    seconds = (inputs.lengths / SAMPLE_RATE).to(logprob)
    unlikely = torch.log1p(-logprob * (tokens + 1))
    rate = tokens / seconds.clamp(min=0.1)
    return torch.stack([logprob, unlikely, entropy, torch.log1p(tokens), seconds, rate, ratio.to(logprob)], dim=1)


def normalised(norm: MaskedBatchNorm, features: torch.Tensor) -> torch.Tensor:
    """Normalise features [batch, features] over the batch."""
    return norm(features[:, :, None], torch.ones_like(features[:, :1, None], dtype=torch.bool))[:, :, 0]


class SmallModelDecider(Router):
    r"""Everything that is known once the smaller model has run: the statistics of its transcript and its encoder states.

    The states are mixed with learned weights as in the paper and averaged over the audio. Since thousands of utterances at most
    are at hand, not half a million, the average is reduced to a few numbers before it meets the statistics :math:`s`:

    .. math::
        u = \mathrm{ReLU}\left(B \, \mathrm{norm}\left(\frac{1}{T} \sum_t \sum_l w_l \, h_{l,t}\right)\right), \qquad
        \mathrm{score} = \mathrm{MLP}([s; u]).

    To the seven statistics of `TranscriptDecider` come the log-probability of the least likely token, and the number of pairs
    of words that were said before. There is no publication that we follow here.

    Arguments
    ---------
    states : int
        Number of encoder states: layers plus one.
    input_size : int
        Dimension of the states.
    state_width : int
        Numbers that the states are reduced to.
    width : int
        Width of the hidden layer.
    dropout : float
        Dropout on the mean of the states and on the hidden layer, in training.
    """

    router_input, label = "small_model", "decider on small model"

    def __init__(
        self, states: int, input_size: int, state_width: int = 8, width: int = 32, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.config = {
            "states": states, "input_size": input_size, "state_width": state_width, "width": width, "dropout": dropout,
        }  # fmt: skip
        self.weights = nn.Parameter(torch.full((states,), 1 / states))
        self.reduce = nn.Sequential(nn.LayerNorm(input_size), nn.Dropout(dropout), nn.Linear(input_size, state_width))
        self.norm = MaskedBatchNorm(9)
        self.layers = nn.Sequential(
            nn.Linear(9 + state_width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return logits [batch]."""
        device = self.norm.weight.device
        unlikeliest = reported(inputs, "min_logprob").to(device)[0]
        repeated = torch.tensor([float(repeated_ngrams(text, 2)) for text in inputs.texts], device=device)
        statistics = torch.cat(
            [transcript_statistics(inputs, device), unlikeliest[:, None], repeated.log1p()[:, None]], dim=1
        )
        frames = inputs.hidden_states[0].shape[1]
        lengths = encoder_frames(inputs.lengths).clamp(1, frames)
        mask = frame_mask(lengths, frames)[:, :, None]
        means = sum(
            weight * (h * mask).sum(dim=1) for weight, h in zip(self.weights, inputs.hidden_states, strict=True)
        )
        reduced = torch.relu(self.reduce(means / lengths[:, None]))
        return self.layers(torch.cat([normalised(self.norm, statistics), reduced], dim=1)).squeeze(1)

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.config


RULES = ("avg_logprob", "sum_logprob", "entropy", "compression_ratio", "duration")


class Rule(Router):
    """A rule without training: a single number that is high for hard utterances.

    Arguments
    ---------
    rule : str
        `avg_logprob`: negated mean log-probability of the smaller model; `sum_logprob`: negated sum, which grows with the number
        of words that may be wrong; `entropy`: entropy of its output distributions in nats; `compression_ratio`: compression ratio
        of its transcript; `duration`: duration of the audio in seconds, which requires no model.

    Raises
    ------
    UserError
        If `rule` is unknown.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        if rule not in RULES:
            raise UserError(f"rule: '{rule}' is not one of {', '.join(RULES)}.{did_you_mean(rule, RULES)}")
        self.rule, self.router_input = rule, "audio" if rule == "duration" else "transcript"

    @property
    def label(self) -> str:
        """Row label in tables."""
        return f"rule: {self.rule}"

    def forward(self, inputs: RouterInput) -> torch.Tensor:
        """Return scores [batch]."""
        if self.rule == "duration":
            return inputs.lengths / SAMPLE_RATE
        if self.rule == "compression_ratio":
            return torch.tensor([compression_ratio(text) for text in inputs.texts])
        wanted = {"entropy": ("entropy",), "sum_logprob": ("avg_logprob", "tokens")}.get(self.rule, ("avg_logprob",))
        values = [[details.get(key) for key in wanted] for details in inputs.details]
        if any(None in row for row in values):
            raise UserError(
                f"rule: the smaller model does not report {' and '.join(wanted)}; use compression_ratio or duration"
            )
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.rule == "sum_logprob":
            return -numbers[:, 0] * (numbers[:, 1] + 1)
        return numbers[:, 0] * (-1 if self.rule == "avg_logprob" else 1)

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"rule": self.rule}


TARGETS = ("label", "gain")


def decider_loss(
    logits: torch.Tensor, gains: torch.Tensor, target: str = "label", positive_weight: float = 1.0, most: float = 3.0
) -> torch.Tensor:
    """Return the loss of a batch.

    Arguments
    ---------
    logits : torch.Tensor
        [batch].
    gains : torch.Tensor
        Errors of the smaller model minus those of the larger, [batch].
    target : str
        `label` (binary cross-entropy of gain > 0) or `gain` (smooth L1 distance to the gain, clipped to +-`most`).
    positive_weight : float
        Weight of utterances with a gain above 0.
    most : float
        Clipping limit in errors; a larger gain indicates one broken transcript rather than a harder utterance.

    Raises
    ------
    UserError
        If `target` is unknown.
    """
    if target not in TARGETS:
        raise UserError(f"target: '{target}' is not label or gain")
    hard = gains > 0
    if target == "label":
        weight = torch.tensor(positive_weight, device=logits.device)
        return nn.functional.binary_cross_entropy_with_logits(logits, hard.to(logits.dtype), pos_weight=weight)
    losses = nn.functional.smooth_l1_loss(logits, gains.clamp(-most, most).to(logits.dtype), reduction="none")
    weights = torch.where(hard, positive_weight, 1.0)
    return (losses * weights).sum() / weights.sum()
