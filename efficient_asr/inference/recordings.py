"""Recordings: find audio files, transcribe them with times, and transcribe the parties of a call separately.

Whisper predicts timestamps. Other models (CTC, cascades) do not: their recordings are split at pauses, and every piece gets the
time of its audio.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.inference.long_audio import in_order, iterate_spans, speech_spans, text_of
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.utils.errors import UserError

# Endings of the files that are transcribed when a folder is given; a file given by its name may have any ending.
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".mp3", ".m4a", ".mp4", ".ogg", ".opus", ".webm", ".aac", ".aiff", ".aif", ".amr", ".wma", ".mkv", ".mov",
    ".3gp", ".caf", ".au", ".mka", ".sph",
)  # fmt: skip
LONGEST_PIECE_S, PAUSE_S = 20.0, 0.8


def find_audio(patterns: Sequence[str | os.PathLike[str]]) -> list[tuple[Path, Path]]:
    """Return the recordings named by files, folders (searched recursively) and glob patterns.

    Arguments
    ---------
    patterns : list of str
        File names, folders, or patterns such as `calls/**/*.wav`. A file that does not exist is returned as it is.

    Returns
    -------
    list of tuple of Path
        Each recording, and its path relative to the folder that was given (its name, if it was given directly), each recording
        once.

    Raises
    ------
    UserError
        If a folder contains no audio, or nothing matches a pattern.
    """
    found: dict[Path, Path] = {}
    for pattern in map(os.fspath, patterns):
        path = Path(os.path.expanduser(pattern))
        if path.is_dir():
            inside = sorted(p for p in _files_in(path) if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path} contains no audio files ({' '.join(AUDIO_SUFFIXES)})")
            found |= {p: p.relative_to(path) for p in inside if p not in found}
        elif path.exists() or not glob.has_magic(pattern):
            found.setdefault(path, Path(path.name))
        else:
            matching = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not matching:
                raise UserError(f"no file matches '{pattern}'")
            found |= {p: Path(p.name) for p in matching if p not in found}
    return list(found.items())


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and in those below it, then those behind links to other folders; no folder is read twice."""
    seen: set[str] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        top = waiting.pop(0)
        for root, folders, files in os.walk(top):  # does not follow links
            if os.path.realpath(root) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(root))
            waiting += sorted(path for name in folders if os.path.islink(path := os.path.join(root, name)))
            yield from (Path(root, name) for name in files)


def transcribe_timed(transcriber: Transcriber, wav: torch.Tensor, batch_size: int | None = None) -> Transcript:
    """Transcribe a recording [time] with timed `segments`, each with `start_s`, `end_s` and `text`.

    Models without timestamps transcribe the pieces between pauses.
    """
    timed = transcriber.with_times()
    if timed is not None:
        found = timed.transcribe(wav)[0]  # a Whisper may predict times behind the end of short audio
        segments = in_order(found.details["segments"], len(wav) / SAMPLE_RATE)
        return Transcript(found.text, found.details | {"segments": segments})
    segments = transcribe_turns(transcriber, wav, batch_size)
    return Transcript(text_of(segments), {"segments": segments})


def iterate_timed(
    transcriber: Transcriber, wav: torch.Tensor, language: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Transcribe a recording [time] piece by piece; yield the timed segments of each piece as soon as they are known.

    A recording that fits into the window is one piece. `language` is for transcribers with `takes_languages`.
    """
    timed = transcriber.with_times()
    longest_s = transcriber.piece_s or LONGEST_PIECE_S
    if timed is None:
        longest_s = min(LONGEST_PIECE_S, longest_s)
    fits = len(wav) <= longest_s * SAMPLE_RATE
    spans = [(0, len(wav))] if fits else speech_spans(wav, round(longest_s * SAMPLE_RATE), PAUSE_S)
    of_pieces, end_s = timed or transcriber, 0.0
    of_pieces = of_pieces if fits else of_pieces.for_long_audio()
    for segments in iterate_spans(of_pieces, wav, spans, 1, language):
        found = in_order(segments, len(wav) / SAMPLE_RATE, end_s)
        end_s = found[-1]["end_s"] if found else end_s
        yield found


def transcribe_turns(
    transcriber: Transcriber, wav: torch.Tensor, batch_size: int | None = None
) -> list[dict[str, Any]]:
    """Split a recording [time] at pauses and return one segment for each piece in which something was said.

    `batch_size` pieces are transcribed together; by default as many as the transcriber takes of long audio, or 8.
    """
    batch_size = batch_size or getattr(transcriber, "batch_size", 8)
    longest_s = min(LONGEST_PIECE_S, transcriber.window_s or LONGEST_PIECE_S)
    spans = speech_spans(wav, round(longest_s * SAMPLE_RATE), PAUSE_S)
    pieces = iterate_spans(transcriber.for_long_audio(), wav, spans, batch_size)
    return in_order([segment for piece in pieces for segment in piece], len(wav) / SAMPLE_RATE)


def transcribe_parties(
    transcriber: Transcriber, channels: torch.Tensor, names: Sequence[str], batch_size: int | None = None
) -> Transcript:
    """Transcribe a call with one party per channel.

    Arguments
    ---------
    transcriber : Transcriber
        The transcriber; every channel is split at its own pauses.
    channels : torch.Tensor
        [channels, time] at 16 kHz.
    names : list of str
        Name of the party on each channel, such as `agent` and `customer`; missing ones are called `channel 2` and so on.
    batch_size : int, optional
        Pieces transcribed together; by default as many as the transcriber takes of long audio, or 8.

    Returns
    -------
    Transcript
        `segments` are the turns of all parties by their start, each with its `speaker`; the text consists of the turns.
    """
    names = [*names, *(f"channel {i}" for i in range(len(names), len(channels)))]
    turns = [
        {"speaker": name} | segment
        for name, wav in zip(names, channels, strict=False)
        for segment in transcribe_turns(transcriber, wav, batch_size)
    ]
    turns.sort(key=lambda turn: (turn["start_s"], turn["end_s"]))
    return Transcript(text_of(turns), {"segments": turns})
