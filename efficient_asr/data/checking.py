"""Checking the audio of a whole manifest: in parallel, with progress, and remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data.audio import AudioReport, inspect_audio
from efficient_asr.data.parallel import in_parallel

PARALLEL_FROM = 1000  # utterances; below, starting processes takes longer than checking
_CHUNK, _REMEMBERED = 250, 20000


@dataclass
class Found:
    """What was found: seconds of every utterance, problems by utterance, and those that are silent or clipped."""

    durations: array
    problems: dict[int, str] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)


def check_files(
    get: Callable[[int], dict[str, Any]], durations: array, samples: bool, memo: Path | None, label: str
) -> Found:
    """Check the audio of many utterances, on all CPU cores.

    Arguments
    ---------
    get : callable
        Number of an utterance -> the utterance, with `audio` and perhaps `duration`.
    durations : array of float
        Seconds as the manifest has them, NaN where it does not say.
    samples : bool
        Decode everything, or read the headers only.
    memo : Path, optional
        Remembers what was found, for as long as sizes and times of the files stay.
    label : str
        For the progress bar.

    Returns
    -------
    Found
        With the missing durations filled in.
    """
    fingerprint = None
    if memo is not None:
        fingerprint = _fingerprint(get, len(durations), samples)
        known = _recall(memo, fingerprint, durations)
        if known is not None:
            return known
    found = Found(array("d", durations))
    chunks = [range(start, min(start + _CHUNK, len(durations))) for start in range(0, len(durations), _CHUNK)]
    progress = tqdm(
        total=len(durations), desc=f"checking {label}", unit="utt", leave=False, mininterval=1,
        disable=len(durations) < PARALLEL_FROM,
    )  # fmt: skip
    with progress:
        check = partial(_check, get, samples, {})
        for chunk, reports in zip(chunks, in_parallel(check, chunks, len(durations) > PARALLEL_FROM), strict=True):
            for i, (duration_s, problem, silent, clipped) in zip(chunk, reports, strict=True):
                if problem is not None:
                    found.problems[i] = problem
                elif math.isnan(durations[i]):
                    found.durations[i] = duration_s
                found.silent += [i] * silent
                found.clipped += [i] * clipped
            progress.update(len(reports))
    if memo is not None and fingerprint is not None:
        _remember(memo, fingerprint, found, durations)
    return found


def _check(
    get: Callable[[int], dict[str, Any]], samples: bool, seen: dict[str, AudioReport], chunk: range
) -> list[AudioReport]:
    """Report on some utterances; `seen` remembers files that several of them share."""
    reports = []
    for i in chunk:
        row = get(i)
        path = row["audio"]
        report = seen.get(path) or inspect_audio(path, samples)
        if len(seen) < _REMEMBERED:
            seen[path] = report
        duration_s, problem, silent, clipped = report
        said = row.get("duration")
        if problem is None and said is not None and abs(said - duration_s) > max(0.1, 0.01 * duration_s):
            problem = f"duration {said} s, but {path} holds {duration_s:.3f} s"
        reports.append(AudioReport(duration_s, problem, silent, clipped))
    return reports


def _fingerprint(get: Callable, count: int, samples: bool) -> str | None:
    """Hash of paths, sizes and times of all audio files; None where one is missing."""
    digest = hashlib.sha256(f"2 {samples} {count}".encode())
    for i in range(count):
        row = get(i)
        try:
            state = os.stat(row["audio"])
        except (OSError, ValueError):
            return None
        digest.update(f"{row['audio']}\0{state.st_size}\0{state.st_mtime_ns}\0{row.get('duration')}\n".encode())
    return digest.hexdigest()


def _recall(memo: Path, fingerprint: str | None, durations: array) -> Found | None:
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        if fingerprint is None or known["fingerprint"] != fingerprint:
            return None
        found = Found(array("d", durations), {int(i): p for i, p in known["problems"].items()})
        found.silent, found.clipped = known["silent"], known["clipped"]
        for i, duration_s in known["durations"].items():
            found.durations[int(i)] = duration_s
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _remember(memo: Path, fingerprint: str, found: Found, durations: array) -> None:
    filled = {i: found.durations[i] for i in range(len(durations)) if math.isnan(durations[i])}
    content = {"fingerprint": fingerprint, "problems": found.problems, "durations": filled}
    partial = memo.with_name(memo.name + ".partial")
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content | {"silent": found.silent, "clipped": found.clipped}), encoding="utf-8")
    os.replace(partial, memo)
