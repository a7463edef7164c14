"""Targets of a student: texts as the teacher writes them, some with timestamps, some after the text before.

Distil-Whisper (arXiv 2311.00430) trains half of its targets with timestamps, so that the student keeps predicting them. What an
utterance gets depends only on its id and the seed: it is the same in every epoch, after a restart, and for a teacher's cache.
"""

from __future__ import annotations

import hashlib
from functools import partial

from efficient_asr.data import Row, Rows
from efficient_asr.text.normalise import spaced
from efficient_asr.utils.errors import UserError


def with_targets(rows: Rows, timestamps: float, previous_text: float, seed: int) -> Rows:
    """Return utterances whose texts are the student's targets.

    Arguments
    ---------
    rows : Rows
        Labelled utterances; those with `segments` can have timestamps.
    timestamps : float
        Share of the utterances with timestamps.
    previous_text : float
        Share of the utterances that follow the text of the one before, if that has the same speaker.
    seed : int
        Seed of the choice.
    """
    return Rows(partial(_target, rows, timestamps, previous_text, seed), rows.durations)


def check_targets(rows: Rows, timestamps: float, previous_text: float, has_timestamps: bool) -> None:
    """Reject shares that the utterances, or the student, make impossible, and say where they have no effect.

    Arguments
    ---------
    rows : Rows
        Labelled utterances.
    timestamps, previous_text : float
        See `with_targets`.
    has_timestamps : bool
        Whether the student has tokens for them.

    Raises
    ------
    UserError
        Naming the key.
    """
    if previous_text and not any(row.get("speaker") is not None for row in rows):
        raise UserError("previous_text_probability: no utterance has a `speaker`, so none follows another; set it to 0")
    if not timestamps:
        return
    if not any(row.get("segments") for row in rows):
        print("timestamp_probability: no utterance has `segments`, so no target has timestamps")
    elif not has_timestamps:
        raise UserError("timestamp_probability: this Whisper has no timestamps; set it to 0")


def is_chosen(name: str, what: str, share: float, seed: int) -> bool:
    """Return whether an utterance is among a random share of all."""
    number = int.from_bytes(hashlib.sha256(f"{seed}\0{what}\0{name}".encode()).digest()[:8], "big")
    return number < share * 2**64


def _target(rows: Rows, timestamps: float, previous_text: float, seed: int, number: int) -> Row:
    row = dict(rows[number])
    row["text"] = spaced(row["text"])
    row["timed"] = bool(row.get("segments")) and is_chosen(row["id"], "timestamps", timestamps, seed)
    if number and is_chosen(row["id"], "previous text", previous_text, seed):
        before = rows[number - 1]
        if before.get("speaker") is not None and before["speaker"] == row.get("speaker"):
            row["previous_text"] = spaced(before["text"])
    return row
