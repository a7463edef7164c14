"""File formats for transcripts: JSON, JSON lines, CSV, text and subtitles (SRT and WebVTT, written by pysubs2)."""

from __future__ import annotations

import csv
import html
import io
import json
from typing import Any

import pysubs2

COLLECTED = ("jsonl", "json", "csv")  # one file for all recordings
SEPARATE = ("txt", "srt", "vtt")  # one file for each recording
TIMED = ("srt", "vtt")
FORMATS = (*COLLECTED, *SEPARATE)


def rounded(value: Any, digits: int = 4) -> Any:
    """Round all floats in nested plain data."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    return [rounded(entry, digits) for entry in value] if isinstance(value, (list, tuple)) else value


def format_records(records: list[dict[str, Any]], kind: str, by_segment: bool = False) -> str:
    """Return the content of one file with all recordings.

    Arguments
    ---------
    records : list of dict
        `audio`, `text`, and further entries for each recording.
    kind : str
        `jsonl`, `json` or `csv`.
    by_segment : bool
        In a CSV file, write one row for each entry of `segments` instead of one for each recording.
    """
    if kind == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if kind == "json":
        return json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    rows = [_plain(record) for record in records]
    if by_segment:
        rows = [
            {"audio": record["audio"]} | _plain(segment)
            for record in records
            for segment in record.get("segments") or [{"text": record["text"]}]
        ]
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["audio", "text"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not isinstance(value, (list, dict))}


def format_record(record: dict[str, Any], kind: str) -> str:
    """Return the content of the file of one recording: `txt` (a line for each turn of a call), `srt` or `vtt`.

    Subtitles require timed `segments`.
    """
    segments = record.get("segments", [])
    if kind == "txt":
        turns = (
            [_spoken(segment) for segment in segments] if any("speaker" in s for s in segments) else [record["text"]]
        )
        return "\n".join(turns) + "\n"
    subtitles = pysubs2.SSAFile()
    for segment in segments:
        text = _spoken(segment) if kind == "srt" else html.escape(_spoken(segment), quote=False)
        start, end = (pysubs2.make_time(s=segment[key]) for key in ("start_s", "end_s"))
        subtitles.append(pysubs2.SSAEvent(start=start, end=end, text=text))
    return subtitles.to_string(kind, keep_ssa_tags=True)


def _spoken(segment: dict[str, Any]) -> str:
    text = " ".join(segment["text"].split())
    return f"{segment['speaker']}: {text}" if "speaker" in segment else text
