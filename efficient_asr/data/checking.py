"""Check all audio of a manifest in parallel, with a progress bar and a cache."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data.audio import AudioReport, inspect_audio
from efficient_asr.data.parallel import in_parallel
from efficient_asr.utils.files import LineStore, file_state

PARALLEL_FROM = 1000  # utterances; for fewer, starting processes takes longer than checking
CHUNK, _REMEMBERED = 250, 20000
ROUNDING_S = 0.008  # a duration may be that much shorter than the audio; models with a window cut off up to 0.01 s


@dataclass
class AudioCheck:
    """Result of a check: durations in seconds, problems by utterance index, and indices of silent or clipped utterances."""

    durations: array
    problems: dict[int, str] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)  # silent because their channels cancel each other out


def check_files(
    get: Callable[[int], dict[str, Any]], durations: array, samples: bool, cache: Path | None, label: str
) -> AudioCheck:
    """Check the audio of many utterances on all CPU cores.

    Arguments
    ---------
    get : callable
        Maps the index of an utterance to its row, with `audio` and optionally `duration` and `offset`.
    durations : array of float
        Durations in seconds from the manifest, NaN if it gives none.
    samples : bool
        Decode all samples instead of only reading the headers.
    cache : Path, optional
        File for the results; valid as long as sizes and modification times of the audio files do not change.
    label : str
        Label of the progress bar.

    Returns
    -------
    AudioCheck
        Results, with missing durations filled in.
    """
    found = AudioCheck(array("d", durations))
    chunks = [range(start, min(start + CHUNK, len(durations))) for start in range(0, len(durations), CHUNK)]
    progress = tqdm(
        total=len(durations), desc=f"checking {label}", unit="utt", leave=False, mininterval=1,
        disable=len(durations) < PARALLEL_FROM,
    )  # fmt: skip
    with _Cache(cache, _fingerprint(get, len(durations), samples) if cache is not None else None) as known, progress:
        left = []
        for chunk in chunks:
            if chunk.start in known.chunks:
                _note(found, chunk, known.chunks[chunk.start], durations)
                progress.update(len(chunk))
            else:
                left.append(chunk)
        check = partial(_check, get, samples, {})
        checked = in_parallel(check, left, len(left) * CHUNK > PARALLEL_FROM)
        for chunk, reports in zip(left, checked, strict=True):
            _note(found, chunk, reports, durations)
            known.add(chunk, reports)
            progress.update(len(chunk))
    return found


def _note(found: AudioCheck, chunk: range, reports: list[AudioReport], durations: array) -> None:
    """Add the reports of one chunk of utterances to the result."""
    for i, (duration_s, problem, silent, clipped, cancelled) in zip(chunk, reports, strict=True):
        if problem is not None:
            found.problems[i] = problem
        elif not duration_s <= durations[i] + ROUNDING_S:  # not known, or rounded down
            found.durations[i] = duration_s
        found.silent += [i] * silent
        found.clipped += [i] * clipped
        found.cancelled |= {i} if cancelled else set()


def _check(
    get: Callable[[int], dict[str, Any]], samples: bool, seen: dict[tuple, AudioReport], chunk: range
) -> list[AudioReport]:
    """Check one chunk of utterances; `seen` caches the reports of files that several utterances share."""
    reports = []
    for i in chunk:
        row = get(i)
        path, offset_s, said_s = row["audio"], row.get("offset"), row.get("duration")
        key = (path,) if offset_s is None else (path, offset_s, said_s)
        report = seen.get(key) or inspect_audio(path, samples, *key[1:])
        if len(seen) < _REMEMBERED:
            seen[key] = report
        duration_s = report.duration_s
        if report.problem is None and said_s is not None and abs(said_s - duration_s) > max(0.1, 0.01 * duration_s):
            report = report._replace(problem=f"duration {said_s} s, but {path} holds {duration_s:.3f} s")
        reports.append(report)
    return reports


def _fingerprint(get: Callable, count: int, samples: bool) -> str | None:
    """Return a hash of paths, sizes and modification times of all audio files; None if a file is missing."""
    digest = hashlib.sha256(f"4 {samples} {count} {CHUNK}".encode())
    for i in range(count):
        row = get(i)
        try:
            state = file_state(row["audio"])
        except (OSError, ValueError):
            return None
        digest.update(f"{row['audio']}\0{state}\0{row.get('duration')}\0{row.get('offset')}\n".encode())
    return digest.hexdigest()


class _Cache:
    """Cache of reports by chunk of utterances; see `LineStore`.

    Chunks with a problem are not cached: a fix may leave size and modification time of the file unchanged.
    """

    def __init__(self, path: Path | None, fingerprint: str | None) -> None:
        self.chunks: dict[int, list[AudioReport]] = {}
        self.lines = (
            LineStore(path, fingerprint, self._accept) if path is not None and fingerprint is not None else None
        )

    def _accept(self, content: Any, start: int, size: int) -> None:
        self.chunks[int(content[0])] = [AudioReport(*report) for report in content[1]]

    def add(self, chunk: range, reports: list[AudioReport]) -> None:
        """Cache the reports of one chunk of utterances."""
        if self.lines is not None and not any(report.problem for report in reports):
            self.lines.append([chunk.start, reports])

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.lines is not None:
            self.lines.close()
