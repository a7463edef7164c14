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


def groups(rows: Iterable[Row], longest_s: float) -> Iterator[list[tuple[Row, torch.Tensor]]]:
    """Yield neighbours of the same speaker and language that last at most `longest_s` seconds together, with their audio."""
    group: list[tuple[Row, torch.Tensor]] = []
    total = 0
    for row in rows:
        wav = load_row(row)  # the manifest's duration may be rounded
        samples = len(wav) + -len(wav) % STEP
        same = group and all(group[-1][0].get(key) == row.get(key) for key in ("speaker", "language"))
        if group and (not same or total + samples > longest_s * SAMPLE_RATE):
            yield group
            group, total = [], 0
        group.append((row, wav))
        total += samples
    if group:
        yield group


def join(group: list[tuple[Row, torch.Tensor]]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the audio [time] of a group, and its text, timed segments and ids."""
    parts, segments, start = [], [], 0
    for row, wav in group:
        padded = torch.nn.functional.pad(wav, (0, -len(wav) % STEP))
        own = row.get("segments") or [{"start_s": 0.0, "end_s": len(wav) / SAMPLE_RATE, "text": row["text"]}]
        offset_s, end_s = start / SAMPLE_RATE, (start + len(wav)) / SAMPLE_RATE
        for segment in own:
            times = {key: round(min(offset_s + segment[key], end_s), 3) for key in ("start_s", "end_s")}
            segments.append({**times, "text": segment["text"]})
        parts.append(padded)
        start += len(padded)
    text = "".join(spaced(row["text"]) for row, _ in group).strip()
    return torch.cat(parts), {"text": text, "segments": segments, "packed": [row["id"] for row, _ in group]}


def write_packed(rows: Iterable[Row], folder: Path, longest_s: float) -> Path:
    """Write the packed audio to `<folder>/packed/*.flac` and its manifest to `<folder>/packed.jsonl`.

    Audio that an earlier run has packed from the same samples is kept as it is, so that what was computed from it stays valid.
    Other files there are deleted.

    Arguments
    ---------
    rows : iterable of dict
        Labelled rows. One that is alone in its group keeps its own audio file.
    folder : Path
        Folder for the output.
    longest_s : float
        Longest packed segment in seconds.
    """
    out, audio_folder, used = folder / "packed.jsonl", folder / "packed", set()
    audio_folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial, open(partial, "w", encoding="utf-8") as file:
        for group in groups(rows, longest_s):
            wav, about = join(group)
            first = group[0][0]
            if len(group) == 1:
                packed = first | {"segments": about["segments"]}
            else:
                samples = np.clip(wav.numpy(), -1.0, 1.0)
                content = "\0".join(about["packed"]).encode() + samples.tobytes()
                name = hashlib.sha256(content).hexdigest()[:12]
                path = audio_folder / f"{name}.flac"
                used.add(path)
                if not path.is_file():
                    with atomic_write(path) as audio:
                        soundfile.write(audio, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                shared = {key: first[key] for key in ("speaker", "language") if key in first}
                where = {"id": f"packed-{name}", "audio": str(path.absolute())}
                packed = where | {"duration": len(wav) / SAMPLE_RATE} | shared | about
            file.write(json.dumps(packed, ensure_ascii=False) + "\n")
    for path in {*audio_folder.glob("*.flac")} - used:
        path.unlink()
    return out
