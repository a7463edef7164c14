"""Pack short utterances into segments of up to 30 s, as in Distil-Whisper's training data (arXiv 2311.00430, section 4).

A Whisper pads everything to its window, so that a training step on 3 s of speech costs as much as one on 30. Neighbours of the
same speaker and language are joined, in the order of the manifest; without speakers, all count as one. Each begins on a
multiple of 0.02 s, the resolution of Whisper's timestamps, and keeps its place as a timed segment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from efficient_asr.data import SAMPLE_RATE, Row, load_row
from efficient_asr.text.normalise import spaced
from efficient_asr.utils.files import atomic_write

STEP = SAMPLE_RATE // 50  # samples between two timestamps


def groups(rows: Iterable[Row], longest_s: float) -> Iterator[list[Row]]:
    """Yield neighbours of the same speaker and language that together last at most `longest_s` seconds."""
    group: list[Row] = []
    total = 0.0
    for row in rows:
        length = -(-round(row["duration"] * SAMPLE_RATE) // STEP) * STEP / SAMPLE_RATE
        same = group and all(group[-1].get(key) == row.get(key) for key in ("speaker", "language"))
        if group and (not same or total + length > longest_s + 1e-9):
            yield group
            group, total = [], 0.0
        group.append(row)
        total += length
    if group:
        yield group


def join(group: list[Row]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the audio [time] of a group, and its text, timed segments and ids."""
    parts, segments, start = [], [], 0
    for row in group:
        wav = load_row(row)
        padded = torch.nn.functional.pad(wav, (0, -len(wav) % STEP))
        own = row.get("segments") or [{"start_s": 0.0, "end_s": len(wav) / SAMPLE_RATE, "text": row["text"]}]
        offset_s, end_s = start / SAMPLE_RATE, (start + len(wav)) / SAMPLE_RATE
        for segment in own:
            times = {key: round(min(offset_s + segment[key], end_s), 3) for key in ("start_s", "end_s")}
            segments.append({**times, "text": segment["text"]})
        parts.append(padded)
        start += len(padded)
    text = "".join(spaced(row["text"]) for row in group).strip()
    return torch.cat(parts), {"text": text, "segments": segments, "packed": [row["id"] for row in group]}


def write_packed(rows: Iterable[Row], folder: Path, longest_s: float) -> Path:
    """Write the packed audio to `<folder>/packed/*.flac` and its manifest to `<folder>/packed.jsonl`.

    Arguments
    ---------
    rows : iterable of dict
        Labelled rows. One that is alone in its group keeps its own audio file.
    folder : Path
        Folder for the output.
    longest_s : float
        Longest packed segment in seconds.
    """
    out = folder / "packed.jsonl"
    (folder / "packed").mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial, open(partial, "w", encoding="utf-8") as file:
        for group in groups(rows, longest_s):
            wav, about = join(group)
            name = hashlib.sha256("\0".join(about["packed"]).encode()).hexdigest()[:12]
            if len(group) == 1:
                packed = group[0] | {"segments": about["segments"]}
            else:
                path = folder / "packed" / f"{name}.flac"
                with atomic_write(path) as audio:
                    samples = np.clip(wav.numpy(), -1.0, 1.0)
                    soundfile.write(audio, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                shared = {key: group[0][key] for key in ("speaker", "language") if key in group[0]}
                where = {"id": f"packed-{name}", "audio": str(path.absolute())}
                packed = where | {"duration": len(wav) / SAMPLE_RATE} | shared | about
            file.write(json.dumps(packed, ensure_ascii=False) + "\n")
    return out
