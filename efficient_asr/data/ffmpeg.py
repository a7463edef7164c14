"""Decode audio with FFmpeg, via PyAV, and check the headers of audio files.

Files whose length libsndfile estimates or does not know are decoded here, and their samples are counted.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

RATES_HZ = (4000, 384000)  # accepted range; other values mean a damaged header
LONGEST_S = 24 * 3600.0
# Demuxers that FFmpeg may use. Excluded: those that open other files or URLs (playlists) or accept arbitrary bytes as audio.
_DEMUXERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
# Demuxers whose duration is stored in the file, not estimated from size and bit rate.
_STATED = frozenset({"flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "wav", "w64", "aiff", "caf"})
_LOST_PACKETS, _LOST_SHARE = 3, 0.05  # limits for undecodable packets: consecutive ones, share of all

_UNKNOWN_SIZE = 0x7FFF0000  # a chunk size of 0 or at least this value means unknown, as when writing to a pipe


def ffmpeg_blocks(
    path: str, start_s: float, end_s: float, sndfile_reason: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (sample rate, block [time, channels]) of a file between two times.

    Raises ValueError if FFmpeg cannot read the file to its end; `sndfile_reason` is the error message of libsndfile, if any.
    """
    place_s, lost, in_row, packets, stated_s = 0.0, 0, 0, 0, None
    with _open_ffmpeg(path, sndfile_reason) as (av, container, stream):
        if container.format.name in _STATED:
            stated_s = _stated(container, stream)
        for packet in container.demux(stream):
            packets += 1
            try:
                frames, in_row = packet.decode(), 0
            except av.error.FFmpegError as error:
                # At the boundary of concatenated recordings, or at an embedded tag, one packet cannot be decoded.
                lost, in_row, why = lost + 1, in_row + 1, error.strerror
                if in_row >= _LOST_PACKETS and not place_s and sndfile_reason:
                    raise ValueError(f"cannot decode {path} ({sndfile_reason})") from None
                if in_row >= _LOST_PACKETS:
                    raise ValueError(f"{path} is damaged after {place_s:.2f} s ({why})") from None
                continue
            for frame in frames:
                _check_rate(path, frame.sample_rate, sndfile_reason)
                begin_s, place_s = place_s, place_s + frame.samples / frame.sample_rate
                if place_s > LONGEST_S:
                    raise ValueError(f"{path} is longer than {LONGEST_S / 3600:.0f} hours; split it")
                if place_s <= start_s:
                    continue
                first = max(0, round((start_s - begin_s) * frame.sample_rate))
                last = frame.samples
                if place_s > end_s:
                    last = round((end_s - begin_s) * frame.sample_rate)
                if last > first:
                    yield frame.sample_rate, _samples(av, frame)[first:last]
            if place_s >= end_s:
                return
    if not place_s and sndfile_reason:
        raise ValueError(f"cannot decode {path} ({sndfile_reason})")
    _check_mp3_frames(path, packets)
    if lost > max(1, _LOST_SHARE * packets):
        raise ValueError(f"{path} is damaged: {lost} of its {packets} packets cannot be decoded")
    _check_stated(path, stated_s, place_s)


def _samples(av: Any, frame: Any) -> np.ndarray:
    """Return the samples of a frame as float32, [time, channels]."""
    if frame.format.name != "fltp":
        (frame,) = av.AudioResampler(format="fltp", layout=frame.layout, rate=frame.sample_rate).resample(frame)
    return frame.to_ndarray().T


class _open_ffmpeg:
    """Context manager that opens a file with FFmpeg; yields PyAV, the container and its first audio stream."""

    def __init__(self, path: str, sndfile_reason: str | None) -> None:
        self.path, self.reason = path, sndfile_reason

    def __enter__(self) -> tuple[Any, Any, Any]:
        try:
            import av
        except ImportError:
            why = (
                f" ({self.reason}; to read more formats: pip install av)"
                if self.reason
                else "; to read it: pip install av"
            )
            raise ValueError(f"cannot decode {self.path}{why}") from None
        av.logging.set_level(None)  # errors are raised anyway
        self.file = open(self.path, "rb")  # pass a file object: FFmpeg may interpret names as URLs
        try:
            self.container = av.open(self.file, options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"})
        except (av.error.FFmpegError, ValueError, OSError) as error:
            self.file.close()
            raise ValueError(f"cannot decode {self.path} ({self.reason or reason_of(error)})") from None
        if not self.container.streams.audio:
            self.__exit__()
            raise ValueError(f"no audio in {self.path}")
        return av, self.container, self.container.streams.audio[0]

    def __exit__(self, *_: Any) -> None:
        self.container.close()
        self.file.close()


def packet_duration(path: str, sndfile_reason: str | None) -> float:
    """Return the duration of a file from its packets, without decoding; raises ValueError if it cannot be determined."""
    seconds, packets, stated_s = 0.0, 0, None
    with _open_ffmpeg(path, sndfile_reason) as (av, container, stream):
        if container.format.name in _STATED:
            stated_s = _stated(container, stream)
        _check_rate(path, stream.rate or 0, sndfile_reason)
        try:
            for packet in container.demux(stream):
                packets += 1
                skipped = sum(_skipped_samples(packet)) / stream.rate
                seconds += float((packet.duration or 0) * stream.time_base) - skipped
        except av.error.FFmpegError as error:
            raise ValueError(f"{path} is damaged after {seconds:.2f} s ({error.strerror})") from None
    _check_mp3_frames(path, packets)
    _check_stated(path, stated_s, seconds)
    if seconds <= 0:
        raise ValueError(
            f"no samples in {path}" if sndfile_reason is None else f"cannot decode {path} ({sndfile_reason})"
        )
    return seconds


def _stated(container: Any, stream: Any) -> float | None:
    """Return the duration stated by a container; None if it states none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _check_stated(path: str, stated_s: float | None, found_s: float) -> None:
    if stated_s is not None and stated_s - found_s > max(0.1, 0.01 * stated_s):
        raise ValueError(f"{path} is truncated: {found_s:.2f} s of {stated_s:.2f} s are present")


def _check_mp3_frames(path: str, packets: int) -> None:
    """Raise ValueError if an MP3 has fewer packets than its Xing or Info tag states."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            file.seek(10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:10])))
            head = b""
        head += file.read(200)
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    if head[:1] != b"\xff" or tag < 0 or not head[tag + 7] & 1:
        return
    frames = int.from_bytes(head[tag + 8 : tag + 12], "big")
    if frames - packets > max(3, 0.01 * frames):
        raise ValueError(f"{path} is truncated: {packets} of its {frames} frames are present")


def _skipped_samples(packet: Any) -> tuple[int, int]:
    """Return the number of encoder padding samples at the start and the end of a packet."""
    for data in getattr(packet, "iter_sidedata", lambda: ())():
        if data.data_type == "skip_samples":
            return struct.unpack("<II", bytes(data)[:8])
    return 0, 0


def bad_rate(path: str, rate: int) -> str | None:
    """Return an error message for an invalid sample rate, None for a valid one."""
    if RATES_HZ[0] <= rate <= RATES_HZ[1]:
        return None
    return f"{path} claims a sample rate of {rate} Hz, which is not plausible for speech"


def _check_rate(path: str, rate: int, sndfile_reason: str | None) -> None:
    problem = bad_rate(path, rate)
    if problem:
        raise ValueError(f"cannot decode {path} ({sndfile_reason})" if sndfile_reason and not rate else problem)


def reason_of(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_chunks(path: str) -> bool:
    """Return whether a file starts like an MP3, and check the chunks of a WAV or AIFF file.

    Raises ValueError if a chunk is truncated or a second recording follows; libsndfile does not report either.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        kind = {b"RIFFWAVE": ("<I", b"data"), b"FORMAIFF": (">I", b"SSND"), b"FORMAIFC": (">I", b"SSND")}.get(
            head[:4] + head[8:12]
        )
        if kind is None:
            return head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
        order, wanted = kind
        place = 12
        while len(header := file.read(8)) == 8:
            name, length = header[:4], struct.unpack(order, header[4:])[0]
            end = place + 8 + length
            if name == head[:4]:
                raise ValueError(f"{path} contains several concatenated recordings; merge them with sox or ffmpeg")
            if name == wanted and 0 < length < _UNKNOWN_SIZE and end > size:
                there, of = max(0, size - place - 8), length
                if of - there > 0.01 * of:
                    raise ValueError(f"{path} is truncated: {there} of its {of} bytes of samples are present")
            if not 0 < length < _UNKNOWN_SIZE and name == wanted:
                break
            place = end + length % 2
            file.seek(place)
    return False
