"""Padding of waveforms, relative and absolute lengths, and checks of model input."""

from __future__ import annotations

import numpy as np
import torch

from efficient_asr.utils.errors import UserError


def pad_wavs(wavs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad waveforms with zeros to `wavs` [batch, time] and relative `wav_lens` [batch]."""
    lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    return batch, lengths / batch.shape[1]


def absolute_lengths(wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
    """Convert relative `wav_lens` [batch] to sample counts [batch] for `wavs` [batch, time]."""
    return (wav_lens.to(torch.float64) * wavs.shape[1]).round().long().clamp(max=wavs.shape[1])


def check_wavs(
    wavs: torch.Tensor | np.ndarray, wav_lens: torch.Tensor | np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return waveforms in the format models expect: float [batch, time], with relative lengths [batch].

    A single waveform [time] becomes a batch of one. Without `wav_lens`, nothing is padded. Integer samples, as some libraries
    return them, are scaled to the range from -1 to 1.

    Raises
    ------
    UserError
        If the samples or the lengths have an invalid shape, type or range.
    """
    wavs = torch.as_tensor(wavs)
    if wavs.dim() == 1:
        wavs = wavs[None]
        wav_lens = None if wav_lens is None else torch.as_tensor(wav_lens).reshape(-1)
    wav_lens = torch.as_tensor(torch.ones(len(wavs)) if wav_lens is None else wav_lens, device=wavs.device)
    if wavs.dim() != 2 or wav_lens.shape != wavs.shape[:1]:
        raise UserError(
            f"wavs must be [batch, time] and wav_lens [batch], not {list(wavs.shape)} and {list(wav_lens.shape)}"
        )
    if len(wav_lens) and (float(wav_lens.max()) > 1.0 + 1e-6 or float(wav_lens.min()) < 0):
        raise UserError(
            f"wav_lens must be relative lengths from 0 to 1, not {float(wav_lens.max()):g}; if they are lengths in samples, "
            f"divide them by {wavs.shape[1]}"
        )
    if not wavs.is_floating_point():
        if wavs.dtype == torch.uint8:
            return (wavs.float() - 128) / 128, wav_lens
        if wavs.dtype not in (torch.int16, torch.int32):
            raise UserError(f"invalid sample type {wavs.dtype}; use floats from -1 to 1 or 16-bit integers")
        return wavs.float() / -torch.iinfo(wavs.dtype).min, wav_lens
    wavs = wavs.float()
    peak = float(wavs.abs().max()) if wavs.numel() else 0.0
    if peak > 250:  # too large for float samples; 16-bit values stay below it only in near silence
        raise UserError(f"samples reach {peak:g}, but floats must be from -1 to 1; divide 16-bit values by 32768")
    if peak != peak:
        raise UserError("wavs contain samples that are not finite (NaN)")
    return wavs, wav_lens


def zero_padding(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Set everything past `lengths` [batch] to zero in `values` [batch, time, ...]."""
    if bool((lengths == values.shape[1]).all()):
        return values
    mask = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
    return values * mask.reshape(*mask.shape, *[1] * (values.dim() - 2))


def frame_mask(frame_lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Return a boolean mask [batch, frames], True on unpadded frames.

    At least one frame per row is True, since attention over no frames is undefined.
    """
    return torch.arange(frames, device=frame_lengths.device) < frame_lengths.clamp(min=1)[:, None]
