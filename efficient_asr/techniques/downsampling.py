r"""Sequence downsampling: feed the encoder fewer samples.

Zaiem, Algayres, Parcollet, Essid, Ravanelli: "Fine-tuning Strategies for Faster Inference using Speech Self-Supervised
Models: A Comparative Study" (arXiv 2303.06740), section on downsampling. The waveform :math:`x` is shortened by a factor
:math:`k` before the encoder, whose cost is linear (and, in attention, quadratic) in its length:

- signal (SD):        :math:`y = \mathrm{resample}(x, 16000 / k)`, a low-pass filter and decimation;
- average (AV):       :math:`y_t = \frac{1}{w} \sum_{j<w} x_{kt + j - 2}`, window :math:`w` = 10 (12 from :math:`k` = 4);
- convolutional (CL): :math:`y_t = b + \sum_{j<161} h_j x_{kt + j}` with learned :math:`h, b`.

The filters are those of `speechbrain.lobes.downsampling`; this file adds exact lengths, so that padding stays masked,
and the identity at factor 1. If the encoder outputs too few frames for the transcript, the head can emit several frames
per hidden state (`frames_per_state`, the paper's "upsampling").

Deviations from the paper:

- SD at factor 3 resamples to exactly 16000/3 Hz. The published numbers seem to come from 5600 Hz (factor 2.857).
- CL can be initialised to the low-pass filter of SD (`convolution_init: lowpass`) instead of randomly: the encoder then
  receives speech from the first step, which matters with only a few hours of training data. The paper uses `random`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from speechbrain.lobes.downsampling import Conv1DDownsampler, PoolingDownsampler, SignalDownsampler
from torch import nn

from efficient_asr.models.parts import Part
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="downsampling",
    parts={"downsampler": ":Downsampler"},
    former_names={"techniques.downsampling.Downsampler": "downsampler"},
    keys=(Key("downsampling_kernel", least=1),),
)
TECHNIQUES = ("none", "signal", "average", "convolutional")
POOLING_PADDING = 2


class Downsampler(Part):
    """Shorten waveforms by a factor.

    Arguments
    ---------
    technique : str
        `signal`, `average`, `convolutional`, or `none`.
    factor : float
        Input samples per output sample, at least 1. `average` and `convolutional` use it as a stride, so it must be an
        integer there. At 1, waveforms are left unchanged.
    kernel_size : int or None
        Taps of the convolution or width of the average; None for the paper's values, 161 and 10 or 12.
    convolution_init : str
        `random` (the paper) or `lowpass`.

    Raises
    ------
    UserError
        If an argument is invalid.
    """

    technique = "downsampling"
    few_frames_advice = "a smaller downsampling_factor"

    def __init__(
        self, technique: str, factor: float = 1, kernel_size: int | None = None, convolution_init: str = "random"
    ) -> None:
        super().__init__()
        if technique not in TECHNIQUES:
            hint = did_you_mean(str(technique), TECHNIQUES)
            raise UserError(
                f"downsampling_technique: expected one of {', '.join(TECHNIQUES)}, got '{technique}'.{hint}"
            )
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 1 <= factor < math.inf:
            raise UserError(f"downsampling_factor: expected a number of at least 1, got {factor!r}")
        if technique in ("average", "convolutional") and factor != int(factor):
            raise UserError(f"downsampling_factor: '{technique}' needs a whole number, got {factor}; use 'signal'")
        if convolution_init not in ("random", "lowpass"):
            raise UserError(f"convolution_init: expected random or lowpass, got '{convolution_init}'")
        self.method = "none" if factor == 1 else technique
        if self.method == "signal" and kernel_size is not None:
            raise UserError("downsampling_kernel: 'signal' has none of its own; leave it at null")
        self.ratio = Fraction(1 if technique == "none" else factor).limit_denominator(1000)
        self.kernel_size = kernel_size
        self.convolution_init = convolution_init
        stride = int(self.ratio)
        if self.method == "signal":
            # A ratio of integers keeps the target rate exact: 16000/3 Hz is not an integer, 3:1 is.
            self.filter = SignalDownsampler(self.ratio, self.ratio.numerator)
        elif self.method == "average":
            self.kernel_size = kernel_size or (12 if stride >= 4 else 10)
            if self.kernel_size < 2 * POOLING_PADDING:
                raise UserError(
                    f"downsampling_kernel: {self.kernel_size} is less than {2 * POOLING_PADDING}, the least for average"
                )
            self.filter = PoolingDownsampler(stride, self.kernel_size, padding=POOLING_PADDING)
        elif self.method == "convolutional":
            self.kernel_size = kernel_size or 161
            self.filter = Conv1DDownsampler(stride, self.kernel_size)
            if convolution_init == "lowpass":
                if self.kernel_size < 3:
                    raise UserError(f"downsampling_kernel: a lowpass needs 3 taps at least, not {self.kernel_size}")
                self._start_as_lowpass()
        else:
            self.filter = nn.Identity()

    def _start_as_lowpass(self) -> None:
        """Initialise the convolution to a Hann-windowed sinc with its cut-off at the new Nyquist frequency."""
        conv = self.filter.downsampler.conv
        with torch.no_grad():
            taps = torch.arange(self.kernel_size) - (self.kernel_size - 1) / 2
            kernel = torch.sinc(taps / float(self.ratio)) * torch.hann_window(self.kernel_size, periodic=False)
            conv.weight.copy_((kernel / kernel.sum()).reshape(conv.weight.shape))
            conv.bias.zero_()

    @property
    def is_identity(self) -> bool:
        """Whether waveforms are left unchanged."""
        return self.method == "none"

    @property
    def label(self) -> str:
        """Technique and factor."""
        return f"{self.method} x{float(self.ratio):g}"

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of output samples [batch] for a number of input samples [batch]."""
        if self.method == "none":
            return lengths
        if self.method == "signal":
            p, q = self.ratio.numerator, self.ratio.denominator
            return torch.div(lengths * q + p - 1, p, rounding_mode="floor")
        padding = POOLING_PADDING if self.method == "average" else 0
        windows = torch.div(lengths + 2 * padding - self.kernel_size, int(self.ratio), rounding_mode="floor") + 1
        return windows.clamp(min=0)

    def forward(self, wavs_and_lengths: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shortened `(wavs, lengths)` for `wavs` [batch, time], padded with zeros, and `lengths` [batch]."""
        wavs, lengths = wavs_and_lengths
        if self.method == "none":
            return wavs, lengths
        if wavs.shape[1] < (self.kernel_size or 1):
            wavs = nn.functional.pad(wavs, (0, self.kernel_size - wavs.shape[1]))
        wavs = self.filter(wavs)
        lengths = self.output_lengths(lengths)
        mask = torch.arange(wavs.shape[1], device=wavs.device) < lengths[:, None]
        return wavs * mask, lengths

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Downsampler:
        """Build the part with random weights; former versions stored a kernel for `signal`, which has none."""
        return cls(**config | ({"kernel_size": None} if config.get("technique") == "signal" else {}))

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        factor = int(self.ratio) if self.ratio.denominator == 1 else float(self.ratio)
        return {
            "technique": self.method, "factor": factor, "kernel_size": self.kernel_size,
            "convolution_init": "random",  # overwritten when the weights are loaded
        }  # fmt: skip
