"""One pass of a model over a manifest: batch by batch, each record kept as soon as it is made, so that a rerun continues.

Batches are cut once, from all utterances. A pass that was interrupted computes the same batches as one that was not, and so the
same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Row, Rows, iterate_batches

Work = Callable[[list[Row], torch.Tensor, torch.Tensor], Sequence[dict[str, Any]]]


def unfinished(rows: Rows, batches: Iterable[Sequence[int]], done: Container[str]) -> list[list[int]]:
    """Return the batches, lists of indices of `rows`, with an utterance whose id is not in `done`."""
    return [list(batch) for batch in batches if any(rows[i]["id"] not in done for i in batch)]


def pass_over(
    rows: Rows,
    batches: Sequence[Sequence[int]],
    done: Container[str],
    work: Work,
    append: Callable[[dict[str, Any]], None],
    desc: str,
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
    """
    with progress_bar(rows, batches, desc) as progress:
        for batch in batches:
            for chunk, wavs, wav_lens in iterate_batches(rows.select(batch), max(1, len(batch))):
                keep(chunk, work(chunk, wavs, wav_lens), done, append)
                progress.update(sum(row["duration"] for row in chunk))


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
