"""Load audio files and detect unusable ones before they are used.

The check covers what the model gets: `inspect_audio` examines the same samples that `load_audio` returns, mixed to
mono and resampled. Container durations that may be estimates are not trusted: samples are counted during decoding.
libsndfile reads the formats it handles exactly (WAV, FLAC, Ogg, AIFF). FFmpeg's decoders, via PyAV, read the rest
(MP3, MP4, M4A, WebM, AAC, AMR, FLAC of unknown length, several recordings concatenated in one file).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio.functional

from efficient_asr.data.ffmpeg import LONGEST_S, bad_rate, check_chunks, ffmpeg_blocks, packet_duration, reason_of
from efficient_asr.data.padding import check_wavs
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import file_state

SAMPLE_RATE = 16000
SILENT_PEAK = 1e-4  # -80 dBFS
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 0.01
BLOCK_SAMPLES = 1 << 20  # samples per read, summed over channels
_LARGEST_KERNEL = 2000  # maximum number of phases; keeps torchaudio's resampling matrix small

_DECODING_ERRORS = (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError, MemoryError)

# Start of a recording, by libsndfile's format name. libsndfile reads only the first recording in a file.
_BEGINNINGS = {
    "OGG": re.compile(rb"OggS\x00[\x02\x03\x06\x07]"),
    "FLAC": re.compile(rb"fLaC[\x00\x80]\x00\x00\x22"),
}


class AudioReport(NamedTuple):
    """Result of checking an audio file: duration, a problem that makes it unusable, and warnings."""

    duration_s: float
    problem: str | None
    silent: bool = False
    clipped: bool = False
    cancelled: bool = False  # silent because its channels cancel each other out when mixed


class _Audio(NamedTuple):
    """Decoded audio: samples [time] at 16 kHz, duration in seconds before resampling, and warnings."""

    wav: torch.Tensor
    duration_s: float
    silent: bool
    clipped: bool
    cancelled: bool


def inspect_audio(
    path: str | Path, samples: bool, offset_s: float | None = None, duration_s: float | None = None
) -> AudioReport:
    """Check an audio file, or a segment of it.

    Arguments
    ---------
    path : str
        The file.
    samples : bool
        Decode the whole file instead of only reading the header (or counting packets, for MP3 and similar formats). Detects
        truncated files, non-finite samples, silence (peak below -80 dBFS) and clipping (over 1 % of the samples at full scale).
    offset_s, duration_s : float, optional
        The segment; see `load_audio`.

    Returns
    -------
    AudioReport
        `problem` is None for a usable file; `duration_s` is that of the segment, if one is given.
    """
    try:
        if samples:
            audio = _decode(str(path), offset_s, duration_s)
            return AudioReport(audio.duration_s, None, audio.silent, audio.clipped, audio.cancelled)
        found_s = _stated_duration(str(path))
        if offset_s is None:
            return AudioReport(found_s, None)
        return AudioReport(_segment(str(path), found_s, offset_s, duration_s), None)
    except ValueError as error:
        return AudioReport(0.0, str(error))


def load_audio(
    source: str | Path | BinaryIO,
    offset_s: float | None = None,
    duration_s: float | None = None,
    longest_s: float = math.inf,
) -> torch.Tensor:
    """Load audio as mono [time] at 16 kHz, in any format supported by libsndfile or FFmpeg; channels are averaged.

    Arguments
    ---------
    source : str, Path or binary file object
        The file. A file object, such as `io.BytesIO` or an upload, is read from its current position to its end.
    offset_s, duration_s : float, optional
        Start reading at `offset_s` (None: read the whole file) and read at most `duration_s` seconds. In WAV, FLAC and
        similar files the reader seeks to the offset; in MP3 and other streams it decodes and drops everything before it.
    longest_s : float
        Stop with an error after so many seconds, whatever the header says.

    Raises
    ------
    UserError
        If the file is missing, cannot be decoded completely, has non-finite samples, ends before the segment does, or is longer
        than `longest_s`.
    """
    with _named_file(source) as path:
        try:
            return _decode(path, offset_s, duration_s, longest_s=longest_s).wav
        except ValueError as error:
            raise UserError(_with_name(str(error), path, source)) from None


def load_channels(source: str | Path | BinaryIO) -> torch.Tensor:
    """Load audio as [channels, time] at 16 kHz, without mixing the channels; see `load_audio`."""
    with _named_file(source) as path:
        try:
            return _decode(path, mix=False).wav
        except ValueError as error:
            raise UserError(_with_name(str(error), path, source)) from None


def from_samples(samples: np.ndarray | torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Return samples as mono [time] at 16 kHz.

    Arguments
    ---------
    samples : numpy.ndarray or torch.Tensor
        [time], [time, channels] or [channels, time] (the shorter dimension is taken as channels); floats from -1 to 1, or
        integers, which are scaled.
    sample_rate : int
        Samples per second.

    Raises
    ------
    UserError
        If the shape, the values or the sample rate are invalid.
    """
    if isinstance(samples, np.ndarray):  # torch takes no negative strides and no foreign byte order
        samples = np.ascontiguousarray(samples, samples.dtype.newbyteorder("="))
    wav = torch.as_tensor(samples)
    if not isinstance(sample_rate, Real) or not math.isfinite(sample_rate) or sample_rate != int(sample_rate):
        raise UserError(f"the sample rate must be a whole number, not {sample_rate!r}")
    sample_rate = int(sample_rate)
    problem = bad_rate("the audio", sample_rate)
    if problem:
        raise UserError(problem)
    if wav.dim() not in (1, 2) or not wav.numel():
        raise UserError(f"samples must be [time], [time, channels] or [channels, time], not {list(wav.shape)}")
    if wav.dim() == 1:
        wav = wav[None]
    wav = wav if wav.shape[0] <= wav.shape[1] else wav.T
    wav, _ = check_wavs(wav, torch.ones(len(wav)))
    return _resample(wav.mean(dim=0), sample_rate)


@contextlib.contextmanager
def _named_file(source: str | Path | BinaryIO) -> Iterator[str]:
    """Yield the path of a source; a file object is copied to a temporary file, since the readers need to seek and reopen."""
    if isinstance(source, (str, os.PathLike)):
        yield os.fspath(source)
        return
    with tempfile.NamedTemporaryFile(suffix=".audio") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        yield copy.name


def _with_name(message: str, path: str, source: str | Path | BinaryIO) -> str:
    """Name the file object instead of its temporary copy in an error message."""
    is_path = isinstance(source, (str, os.PathLike))
    return message if is_path else message.replace(path, str(getattr(source, "name", "the file object")))


def load_row(row: dict[str, Any]) -> torch.Tensor:
    """Load the audio [time] of a manifest row: its segment, or the whole file; see `load_audio`."""
    if row.get("offset") is None:
        return load_audio(row["audio"])
    return load_audio(row["audio"], row["offset"], row.get("duration"))


def silence(path: str | Path, cancelled: bool) -> str:
    """Return the message for a silent recording; `cancelled` as in `AudioReport`."""
    return f"{path} is silent" + (": its channels cancel each other out when mixed to mono" if cancelled else "")


# ------------------------------------------------------------ decoding


def _decode(
    path: str,
    offset_s: float | None = None,
    duration_s: float | None = None,
    mix: bool = True,
    longest_s: float = math.inf,
) -> _Audio:
    """Decode a file, or a segment of it, to model input; raises ValueError if the file is unusable.

    Without `mix`, the samples are [channels, time].
    """
    start_s, end_s = offset_s or 0.0, math.inf
    if offset_s is not None and duration_s is not None:
        end_s = start_s + duration_s
    pieces: list[tuple[int, list[np.ndarray]]] = []  # by sample rate, which may change between recordings
    peak, clipped, count, place_s = 0.0, 0, 0, 0.0
    for rate, block in _blocks(path, start_s, end_s):
        place_s += len(block) / rate
        if place_s > longest_s:
            raise ValueError(f"{path} is longer than {longest_s:g} s")
        if not np.isfinite(block).all():
            raise ValueError(f"{path} has samples that are not finite")
        levels = np.abs(block)
        peak = max(peak, float(levels.max()))
        clipped, count = clipped + int((levels >= CLIPPED_LEVEL).sum()), count + levels.size
        if not pieces or pieces[-1][0] != rate:
            pieces.append((rate, []))
        pieces[-1][1].append(block.mean(axis=1) if mix else block)
    found_s = sum(sum(map(len, blocks)) / rate for rate, blocks in pieces)
    if offset_s is not None:
        _segment(path, start_s + found_s if count else _stated_duration(path), offset_s, duration_s)
    if not count:
        raise ValueError(f"no samples in {path}")
    if len({block.shape[1:] for _, blocks in pieces for block in blocks}) > 1:
        raise ValueError(f"{path} contains recordings with different numbers of channels")
    # [time] or [channels, time]
    parts = [_resample(torch.from_numpy(np.concatenate(blocks).T), rate) for rate, blocks in pieces]
    wav = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    silent = not wav.numel() or float(wav.abs().max()) < SILENT_PEAK
    return _Audio(wav, found_s, silent, clipped > CLIPPED_SHARE * count, silent and peak >= SILENT_PEAK)


def _segment(path: str, found_s: float, offset_s: float, duration_s: float | None) -> float:
    """Return the duration of a segment in a file of `found_s` seconds; raises ValueError if the file ends too early."""
    wanted_s = offset_s + (duration_s or 0.0)
    if wanted_s - found_s > 0.1 or found_s - offset_s <= 0:
        until = f" to {wanted_s:.2f}" if duration_s is not None else ""
        raise ValueError(f"segment from {offset_s:.2f}{until} s, but {path} ends at {found_s:.2f} s")
    return found_s - offset_s if duration_s is None else min(duration_s, found_s - offset_s)


def _blocks(path: str, start_s: float, end_s: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (sample rate, block [time, channels]) of a file between two times."""
    file, reason = _open_soundfile(path)
    if file is None:
        yield from ffmpeg_blocks(path, start_s, end_s, reason)
        return
    with file:
        if _begins_again(path, file.format):
            yield from ffmpeg_blocks(path, start_s, end_s, None)
        else:
            yield from _soundfile_blocks(file, path, start_s, end_s)


def _open_soundfile(path: str) -> tuple[soundfile.SoundFile | None, str | None]:
    """Open a file with libsndfile. Return None if FFmpeg must read it, with libsndfile's error message if it failed.

    Raises ValueError if neither can read it.
    """
    if not os.path.isfile(path):
        target = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        what = "not a file" if os.path.exists(path) else "no such file"
        raise ValueError(f"{what}: {path}{target}")
    if check_chunks(path):
        return None, None
    try:
        file = soundfile.SoundFile(path)
    except _DECODING_ERRORS as error:
        return None, reason_of(error)
    # The length of an MP3 is an estimate, and that of a FLAC written to a pipe is unknown.
    if file.format == "MP3" or file.subtype.startswith("MPEG") or file.frames / max(1, file.samplerate) > LONGEST_S:
        file.close()
        return None, None
    problem = f"no samples in {path}" if file.frames <= 0 else bad_rate(path, file.samplerate)
    if problem:
        file.close()
        raise ValueError(problem)
    return file, None


def _soundfile_blocks(
    file: soundfile.SoundFile, path: str, start_s: float, end_s: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks read by libsndfile; raises ValueError if decoding fails or ends too early."""
    rate = file.samplerate
    first, last = min(round(start_s * rate), file.frames), file.frames
    if not math.isinf(end_s):
        last = min(last, round(end_s * rate))
    size, place = max(1, BLOCK_SAMPLES // file.channels), first
    while place < last:
        try:
            if place == first and first:
                _skip(file, first)
            block = file.read(min(size, last - place), dtype="float32", always_2d=True)
        except _DECODING_ERRORS as error:
            raise ValueError(f"{path} is damaged after {place / rate:.2f} s ({reason_of(error)})") from None
        if not len(block):
            break
        place += len(block)
        yield rate, block
    if (last - place) / rate > max(0.1, 0.01 * last / rate):
        raise ValueError(f"{path} is truncated: {place / rate:.2f} s of {file.frames / rate:.2f} s are present")


def _skip(file: soundfile.SoundFile, samples: int) -> None:
    """Seek to a sample; Ogg is decoded up to it, as libsndfile's seeking is inexact near the end of the file."""
    if file.format != "OGG":
        file.seek(samples)
        return
    while samples > 0 and (read := len(file.read(min(samples, BLOCK_SAMPLES), dtype="float32"))):
        samples -= read


def _begins_again(path: str, kind: str) -> bool:
    """Return whether the file contains a second recording."""
    return kind in _BEGINNINGS and _finds_second(path, kind, file_state(path))


@functools.lru_cache(maxsize=1 << 16)
def _finds_second(path: str, kind: str, state: str) -> bool:
    """Search a file in this `state` for a second recording; once, not for each of its segments."""
    with open(path, "rb") as file:
        content = file.read()
    places = [match.start() for match in _BEGINNINGS[kind].finditer(content)]
    # All streams of one Ogg recording begin before its first page without a begin flag.
    pages = re.compile(rb"OggS\x00[\x00\x01\x04\x05]").search(content) if kind == "OGG" else None
    return any(place > (pages.start() if pages else 0) for place in places)


# ------------------------------------------------------------ durations from headers


def _stated_duration(path: str) -> float:
    """Return the duration of a file without decoding it: from a reliable header, otherwise from its packets."""
    file, reason = _open_soundfile(path)
    if file is not None:
        with file:
            # Skip this for FLAC: it would read every file of a large corpus for a very rare case, which decoding detects.
            if file.format != "OGG" or not _begins_again(path, file.format):
                return file.frames / file.samplerate
    return packet_duration(path, reason)


def _resample(wav: torch.Tensor, rate: int) -> torch.Tensor:
    """Resample to 16 kHz with torchaudio, or with scipy if a small common divisor would make torchaudio's kernel huge."""
    if rate == SAMPLE_RATE:
        return wav
    common = math.gcd(rate, SAMPLE_RATE)
    if max(rate, SAMPLE_RATE) // common <= _LARGEST_KERNEL:
        return torchaudio.functional.resample(wav, rate, SAMPLE_RATE)
    from scipy.signal import resample_poly

    resampled = resample_poly(wav.numpy(), SAMPLE_RATE // common, rate // common, axis=-1)
    return torch.from_numpy(resampled.astype(np.float32))
