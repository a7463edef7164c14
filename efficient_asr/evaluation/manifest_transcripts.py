"""Transcripts of a manifest, beside the columns of its rows: utterance by utterance on the disk, so that a rerun continues."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch

from efficient_asr.data import ORIGIN, BatchOrder, Row, Rows
from efficient_asr.evaluation.records import PartFiles
from efficient_asr.inference.formats import rounded
from efficient_asr.inference.manifest_pass import pass_over, unfinished
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, is_unchanged, state_of

STATE = "_efficient_asr_file"  # field of records in part files: size and modification time of the audio


def write_transcripts(
    transcriber: Transcriber,
    rows: Rows,
    out: Path,
    key: str,
    column: str = "hypothesis",
    batch_size: int = 1,
    skip_bad: bool = False,
) -> int:
    """Transcribe all utterances and write their rows with the transcripts, in the order of `rows`; a rerun continues.

    Arguments
    ---------
    transcriber : Transcriber
        The model.
    rows : Rows
        The utterances; their texts are not used.
    out : Path
        JSON lines: all fields of the row (`audio` is absolute, and `end` becomes `duration`), then `column` with the text, and
        `<column>_details` with what the model tells about it; for audio that cannot be read, `<column>_problem` instead.
    key : str
        Identifies model, options and utterances; transcripts of an interrupted run with the same key are kept, except of audio
        that has changed since or could not be read.
    column : str
        Field for the transcripts.
    batch_size : int
        Utterances transcribed together, by length.
    skip_bad : bool
        Whether to go on after audio that cannot be read.

    Returns
    -------
    int
        Number of utterances whose audio could not be read.

    Raises
    ------
    UserError
        If a row has the field already, if audio cannot be read, or if the model does not know a language.
    """
    details, problem = f"{column}_details", f"{column}_problem"
    fields = (column, details, problem)
    taken = next((row for row in rows if any(name in row for name in fields)), None)
    if taken is not None:
        name = next(name for name in fields if name in taken)
        raise UserError(f"--output_column: utterance '{taken['id']}' has a field '{name}' already; choose another name")
    transcriber.check_rows(rows, "manifest")

    def work(batch: Sequence[Row], wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[dict[str, Any]]:
        found = transcribe_rows(transcriber, list(batch), wavs, wav_lens)
        return [
            {"id": row["id"], STATE: states.get(row["id"]), column: each.text, details: rounded(each.details)}
            for row, each in zip(batch, found, strict=True)
        ]

    parts = PartFiles(out, key)
    done = current_ids(parts, rows)
    if done:
        print(f"{len(done)} of {len(rows)} utterances are transcribed already")
    order = BatchOrder(rows.durations, "descending", batch_size, None, repeat=False)
    todo, states = unfinished(rows, order, done), states_now(rows, done)
    with parts.open() as file:
        pass_over(rows, todo, done, work, file.append, "transcribing", skip_bad)
    bad = 0
    with atomic_write(out) as partial, open(partial, "w", encoding="utf-8") as lines:
        for row, record in zip(rows, parts.merge(row["id"] for row in rows), strict=True):
            if column not in record:
                bad += 1
                record = {problem: record["problem"]}
            kept = {name: value for name, value in row.items() if name != ORIGIN}
            record.pop(STATE, None)
            lines.write(json.dumps(kept | record, ensure_ascii=False) + "\n")
    parts.discard()
    return bad


def current_ids(parts: PartFiles, rows: Rows) -> set[str]:
    """Return the ids of the utterances whose records in part files are of the audio as it is now."""
    return {row["id"] for row in rows if row["id"] in parts.places and _is_current(parts[row["id"]], row)}


def states_now(rows: Rows, done: Container[str]) -> dict[str, str | None]:
    """Return the states of the audio of the utterances that are not in `done`, by id."""
    return {row["id"]: state_of(row["audio"]) for row in rows if row["id"] not in done}


def _is_current(record: dict[str, Any], row: Row) -> bool:
    """Whether a record is of the audio as it is now; audio that could not be read may have been repaired."""
    state = record.get(STATE, record.get("file"))  # its name in former versions
    return "problem" not in record and is_unchanged(row["audio"], state)
