"""Audio files: reading them, and telling what is wrong with one before anything depends on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio.functional

from efficient_asr.errors import UserError

SAMPLE_RATE = 16000
RATES_HZ = (4000, 384000)  # what a file may claim; anything else is a damaged header
LONGEST_S = 24 * 3600.0
SILENT_PEAK = 1e-4  # -80 dBFS
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 0.01
BLOCK_SAMPLES = 1 << 20  # read at a time, over all channels
_LARGEST_KERNEL = 2000  # phases up to which torchaudio's resampling matrix stays small

_DECODING_ERRORS = (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError, MemoryError)


class AudioReport(NamedTuple):
    """What is known of an audio file: its seconds, what makes it unusable, and what is merely worth knowing."""

    duration_s: float
    problem: str | None
    silent: bool = False
    clipped: bool = False


def _open(path: str) -> soundfile.SoundFile:
    """Open a file after checking what its header claims; raises ValueError with what is wrong."""
    if not os.path.isfile(path):
        target = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        what = "not a file" if os.path.exists(path) else "no such file"
        raise ValueError(f"{what}: {path}{target}")
    try:
        file = soundfile.SoundFile(path)
    except _DECODING_ERRORS as error:
        raise ValueError(f"cannot decode {path} ({_reason(error)})") from None
    problem = None
    if file.frames <= 0:
        problem = f"no samples in {path}"
    elif not RATES_HZ[0] <= file.samplerate <= RATES_HZ[1]:
        problem = f"{path} claims a sample rate of {file.samplerate} Hz, which is not one of speech"
    elif file.frames / file.samplerate > LONGEST_S:
        problem = f"{path} claims to last {file.frames / file.samplerate / 3600:.0f} hours; its header is damaged"
    if problem:
        file.close()
        raise ValueError(problem)
    return file


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _blocks(file: soundfile.SoundFile, path: str) -> Iterator[np.ndarray]:
    """Yield blocks [time, channels]; raises ValueError where decoding fails or ends too early."""
    size, count = max(1, BLOCK_SAMPLES // file.channels), 0
    while True:
        try:
            block = file.read(size, dtype="float32", always_2d=True)
        except _DECODING_ERRORS as error:
            raise ValueError(f"{path} is damaged after {count / file.samplerate:.2f} s ({_reason(error)})") from None
        if not len(block):
            break
        count += len(block)
        if not np.isfinite(block).all():
            raise ValueError(f"{path} has samples that are not finite")
        yield block
    expected_s, found_s = file.frames / file.samplerate, count / file.samplerate
    if expected_s - found_s > max(0.1, 0.01 * expected_s):
        raise ValueError(f"{path} is truncated: {found_s:.2f} s are there of {expected_s:.2f} s")
    if not count:
        raise ValueError(f"no samples in {path}")


def inspect_audio(path: str, samples: bool) -> AudioReport:
    """Look at an audio file.

    Arguments
    ---------
    path : str
        The file.
    samples : bool
        Decode everything, instead of reading the header only: finds truncated files, samples that are not finite,
        silence (peak below -80 dBFS) and clipping (over 1 % of the samples at full scale).

    Returns
    -------
    AudioReport
        `problem` is None for a usable file.
    """
    try:
        with _open(path) as file:
            duration_s = file.frames / file.samplerate
            if not samples:
                return AudioReport(duration_s, None)
            peak, clipped, count = 0.0, 0, 0
            for block in _blocks(file, path):
                levels = np.abs(block)
                peak = max(peak, float(levels.max()))
                clipped += int((levels >= CLIPPED_LEVEL).sum())
                count += levels.size
        return AudioReport(duration_s, None, peak < SILENT_PEAK, clipped > CLIPPED_SHARE * count)
    except ValueError as error:
        return AudioReport(0.0, str(error))


def load_audio(path: str | Path) -> torch.Tensor:
    """Read any file that libsndfile knows as mono [time] at 16 kHz.

    Raises
    ------
    UserError
        Where the file is missing, cannot be decoded to its end, or has samples that are not finite.
    """
    try:
        with _open(str(path)) as file:
            rate = file.samplerate
            samples = np.concatenate([block.mean(axis=1) for block in _blocks(file, str(path))])
    except ValueError as error:
        raise UserError(str(error)) from None
    wav = torch.from_numpy(samples)
    if rate != SAMPLE_RATE:
        wav = _resample(wav, rate)
    return wav


def _resample(wav: torch.Tensor, rate: int) -> torch.Tensor:
    """Resample to 16 kHz: torchaudio's filter, or scipy's where the two rates share so few factors that it would be huge."""
    common = math.gcd(rate, SAMPLE_RATE)
    if max(rate, SAMPLE_RATE) // common <= _LARGEST_KERNEL:
        return torchaudio.functional.resample(wav, rate, SAMPLE_RATE)
    from scipy.signal import resample_poly

    return torch.from_numpy(resample_poly(wav.numpy(), SAMPLE_RATE // common, rate // common).astype(np.float32))
