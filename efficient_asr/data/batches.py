"""Batches: in manifest order for evaluation, in a reproducible and resumable order for training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from efficient_asr.data.audio import SAMPLE_RATE, load_row
from efficient_asr.data.manifest import Row, Rows, report_skipped
from efficient_asr.data.padding import pad_wavs
from efficient_asr.data.parallel import Loader
from efficient_asr.data.sampler import BatchOrder
from efficient_asr.text.normalise import Normaliser
from efficient_asr.utils.errors import UserError, listing

if TYPE_CHECKING:
    from speechbrain.dataio.batch import PaddedBatch


def iterate_batches(rows: Rows, batch_size: int) -> Iterator[tuple[list[Row], torch.Tensor, torch.Tensor]]:
    """Load utterances in order, `batch_size` at a time; yields (rows, wavs [batch, time], wav_lens [batch])."""
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield chunk, *pad_wavs([_load(row) for row in chunk])


def _load(row: Row) -> torch.Tensor:
    try:
        return load_row(row)
    except UserError as error:
        raise UserError(f"utterance '{row['id']}': {error}; fix this, then rerun the command to resume") from None


def normalise_texts(
    rows: Rows, normaliser: Normaliser, skip_bad: bool = False, skipped_file: Path | None = None
) -> Rows:
    """Return the utterances with normalised text.

    Raises
    ------
    UserError
        Naming the utterances whose text becomes empty; with `skip_bad` they are left out instead.
    """
    out = rows.map(partial(_normalise, normaliser))
    empty = [i for i in range(len(rows)) if not out[i]["text"]]
    if empty:
        problems = [
            {"id": rows[i]["id"], "problem": f"text {rows[i]['text']!r} is empty after normalisation"} for i in empty
        ]
        if not skip_bad:
            shown = listing([f"{b['id']}: {b['problem']}" for b in problems])
            count = f"{len(empty)} texts are" if len(empty) > 1 else "1 text is"
            raise UserError(f"{count} empty:\n{shown}\nFix them, or skip them with --skip_bad True.")
        report_skipped("texts", problems, skipped_file)
        out = out.select(np.setdiff1d(np.arange(len(rows)), empty))
    return out


def _normalise(normaliser: Normaliser, row: Row) -> Row:
    return {**row, "text": normaliser(row["text"], row.get("language", "en"))}


class Labels(Protocol):
    """Converts an utterance to training targets."""

    def encode_row(self, row: Row) -> list[int]:
        """Return label indices or token ids."""


class Utterances(Dataset):
    """Dataset with `id`, `wav` [time], `tokens` [labels], `text`, `duration`, `language`; `id` and `problem` if unreadable."""

    def __init__(self, rows: Rows, labels: Labels) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        try:
            wav = load_row(row)
        except UserError as error:
            return {"id": row["id"], "problem": str(error)}
        tokens = torch.tensor(self.labels.encode_row(row), dtype=torch.long)
        return {
            "id": row["id"],
            "wav": wav,
            "tokens": tokens,
            "text": row["text"],
            "duration": row["duration"],
            "language": row.get("language") or "",
        }


def collate(items: list[dict[str, Any]], multiple: int = 1) -> PaddedBatch | SimpleNamespace:
    """Return a batch, padded to a multiple of so many samples.

    `problems` lists unreadable utterances; `id` is empty if all of them are unreadable.
    """
    from speechbrain.dataio.batch import PaddedBatch, PaddedData  # importing SpeechBrain takes over a second

    good = [item for item in items if "problem" not in item]
    batch = PaddedBatch(good) if good else SimpleNamespace(id=[])
    if multiple > 1 and good and batch.wav.data.shape[1] % multiple:
        wavs, wav_lens = batch.wav
        time = -(-wavs.shape[1] // multiple) * multiple
        wavs, wav_lens = torch.nn.functional.pad(wavs, (0, time - wavs.shape[1])), wav_lens * (wavs.shape[1] / time)
        batch.wav = PaddedData(wavs, wav_lens)
    batch.problems = [item for item in items if "problem" in item]
    return batch


def make_loader(
    rows: Rows | Dataset, labels: Labels, order: BatchOrder, num_workers: int, round_lengths_s: float | None = None
) -> DataLoader:
    """Return the data loader for the utterances of a training or validation set, or for a dataset of them.

    With `round_lengths_s`, batches are padded to a multiple of so many seconds: a GPU then sees few different shapes.
    """
    return Loader(
        rows if isinstance(rows, Dataset) else Utterances(rows, labels),
        batch_sampler=order,
        collate_fn=partial(collate, multiple=max(1, round((round_lengths_s or 0) * SAMPLE_RATE))),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # ending them takes seconds, after every epoch and every validation
        pin_memory=torch.cuda.is_available(),
    )
