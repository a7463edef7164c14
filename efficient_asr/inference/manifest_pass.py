"""One pass of a model over a manifest: batch by batch, each record kept as soon as it is made, so that a rerun continues.

Batches are cut once, from all utterances. A pass that was interrupted computes the same batches as one that was not, and so the
same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Row, Rows, iterate_batches, load_row
from efficient_asr.utils.errors import UserError

Work = Callable[[list[Row], torch.Tensor, torch.Tensor], Sequence[dict[str, Any]]]


def unfinished(rows: Rows, batches: Iterable[Sequence[int]], done: Container[str]) -> list[list[int]]:
    """Return the batches, lists of indices of `rows`, with an utterance whose id is not in `done`."""
    return [list(batch) for batch in batches if any(rows[i]["id"] not in done for i in batch)]


def worked(rows: Rows, work: Work, skip_bad: bool | None = None) -> list[dict[str, Any]]:
    """Return the records of a batch.

    Arguments
    ---------
    rows : Rows
        The utterances of the batch.
    work : callable
        `(rows, wavs [batch, time], wav_lens [batch])` -> one record each.
    skip_bad : bool, optional
        The record of an utterance whose audio cannot be read is `{"id": ..., "problem": ...}`, instead of an error. None for
        commands that have no such option.

    Raises
    ------
    UserError
        Naming an utterance whose audio cannot be read.
    """
    problems: dict[str, dict[str, Any]] = {}
    try:
        loaded = list(iterate_batches(rows, max(1, len(rows))))
    except UserError as error:
        if not skip_bad:
            advice = "" if skip_bad is None else ", or pass --skip_bad True to go on without it"
            raise UserError(f"{error}{advice}") from None
        for row in rows:
            try:
                load_row(row)
            except UserError as error:
                problems[row["id"]] = {"id": row["id"], "problem": str(error)}
        left = rows.select([i for i, row in enumerate(rows) if row["id"] not in problems])
        loaded = list(iterate_batches(left, max(1, len(left))))
    found = iter([record for batch in loaded for record in work(*batch)])
    return [problems[row["id"]] if row["id"] in problems else next(found) for row in rows]


def pass_over(
    rows: Rows,
    batches: Sequence[Sequence[int]],
    done: Container[str],
    work: Work,
    append: Callable[[dict[str, Any]], None],
    desc: str,
    skip_bad: bool | None = None,
) -> None:
    """Compute the records of batches; see the module docstring.

    Arguments
    ---------
    rows : Rows
        All utterances.
    batches : list of list of int
        Indices of `rows` to work on; see `unfinished`.
    done : container of str
        Ids whose record exists already; it is computed again with its batch, but not kept again.
    work : callable
        `(rows, wavs [batch, time], wav_lens [batch])` -> one record each.
    append : callable
        Keeps a record.
    desc : str
        Shown with the progress.
    skip_bad : bool, optional
        See `worked`.
    """
    with progress_bar(rows, batches, desc) as progress:
        for batch in batches:
            chunk = rows.select(batch)
            keep(chunk, worked(chunk, work, skip_bad), done, append)
            progress.update(float(chunk.durations.sum()))


def keep(
    rows: Sequence[Row],
    records: Sequence[dict[str, Any]],
    done: Container[str],
    append: Callable[[dict[str, Any]], None],
) -> None:
    """Keep the records of a batch that are not in `done`."""
    for row, record in zip(rows, records, strict=True):
        if row["id"] not in done:
            append(record)


def progress_bar(rows: Rows, batches: Sequence[Sequence[int]], desc: str) -> tqdm:
    """Return a progress bar in seconds of audio, with an estimate of the time left."""
    total = float(sum(rows.durations[batch].sum() for batch in batches))
    shape = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(
        total=total, desc=desc, unit="s", leave=False, mininterval=1, bar_format=shape, disable=not len(batches)
    )
