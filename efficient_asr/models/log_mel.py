"""Whisper's log-mel features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank

from efficient_asr.data import SAMPLE_RATE, frame_mask

N_FFT, HOP = 400, 160


def encoder_frames(samples: Any) -> Any:
    """Return the number of encoder frames for `samples` (number or tensor): one per 320, rounded up from whole mel frames."""
    return (samples // HOP + 1) // 2


def mask_features(
    mel: torch.Tensor, masks: int, frames: int, bands: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """SpecAugment (arXiv 1904.08779) without time warping: zero spans of time and of frequency in each row.

    Arguments
    ---------
    mel : torch.Tensor
        Log-mel features, [batch, mels, frames].
    masks : int
        Number of spans of time, and of spans of frequency.
    frames, bands : int
        Greatest width of a span of time and of frequency.
    lengths : torch.Tensor, optional
        Frames of each row that may be masked, [batch]; by default all.
    """
    keep = torch.ones(mel.shape[0], 1, 1, dtype=torch.bool, device=mel.device)
    for dim, widest in ((2, frames), (1, bands)):
        size = torch.full((len(mel), 1, 1), float(mel.shape[dim]))
        if dim == 2 and lengths is not None:
            size = lengths.float().cpu()[:, None, None]
        # drawn on the CPU, so that a GPU masks what a CPU masks; places of all rows are compared at once
        widths = (torch.rand(len(mel), masks, 1) * (size.clamp(max=widest) + 1)).floor()
        starts = (torch.rand(len(mel), masks, 1) * (size - widths + 1)).floor()
        widths, starts = (values.to(mel.device, non_blocking=True) for values in (widths, starts))
        places = torch.arange(mel.shape[dim], device=mel.device)
        masked = ((places >= starts) & (places < starts + widths)).any(dim=1)
        keep = keep & ~masked.unsqueeze(3 - dim)
    return mel * keep


class LogMel(nn.Module):
    """Whisper's log-mel features, normalised per utterance.

    Arguments
    ---------
    n_mels : int
        Number of mel bands (80, or 128 for large-v3).
    """

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        bank = mel_filter_bank(1 + N_FFT // 2, n_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", torch.from_numpy(bank).float().T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return [batch, n_mels, frames], one frame per 160 samples of `wavs`; those past `lengths // 160` are zero."""
        frames, count = lengths // HOP, max(1, wavs.shape[1] // HOP)
        with torch.autocast(wavs.device.type, enabled=False):  # 1e-10 underflows in half precision
            # Zeros are appended, as in Whisper's padded window: without them, the last frames would contain the mirrored signal.
            spectrum = torch.stft(
                nn.functional.pad(wavs.float(), (0, N_FFT)), N_FFT, HOP, window=self.window, return_complex=True
            )
            power = spectrum[..., :count].abs().pow(2)
            log_mel = torch.matmul(self.filters, power).clamp(min=1e-10).log10()
        mask = frame_mask(frames, log_mel.shape[2])[:, None]
        loudest = log_mel.masked_fill(~mask, -torch.inf).amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0 * mask
