"""Batches: for measuring, in the order of the manifest; for training, by a plan that any process can repeat from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader, Dataset, Sampler

from efficient_asr.data.audio import load_row
from efficient_asr.data.manifest import Row, Rows, report_skipped
from efficient_asr.data.parallel import Loader
from efficient_asr.errors import UserError, listing
from efficient_asr.text import Normaliser

SORTINGS = ("ascending", "descending", "random")
JITTER = 0.05  # how far a random order may shift an utterance's length when batches are formed by length


def pad_wavs(wavs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad waveforms with zeros to `wavs` [batch, time] and relative `wav_lens` [batch]."""
    lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    return batch, lengths / batch.shape[1]


def iterate_batches(rows: Rows, batch_size: int) -> Iterator[tuple[list[Row], torch.Tensor, torch.Tensor]]:
    """Load utterances in order, `batch_size` at a time; yields rows, wavs [batch, time], wav_lens [batch]."""
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield chunk, *pad_wavs([_load(row) for row in chunk])


def _load(row: Row) -> torch.Tensor:
    try:
        return load_row(row)
    except UserError as error:
        raise UserError(
            f"utterance '{row['id']}': {error}; mend it and start the same command again to go on"
        ) from None


def normalise_texts(
    rows: Rows, normaliser: Normaliser, skip_bad: bool = False, skipped_file: Path | None = None
) -> Rows:
    """Return the utterances with normalised text.

    Raises
    ------
    UserError
        Naming the utterances whose text becomes empty, unless `skip_bad` leaves them out.
    """
    out = rows.map(partial(_normalise, normaliser))
    empty = [i for i in range(len(rows)) if not out[i]["text"]]
    if empty:
        problems = [
            {"id": rows[i]["id"], "problem": f"nothing is left of the text {rows[i]['text']!r} after normalisation"}
            for i in empty
        ]
        if not skip_bad:
            shown = listing([f"{b['id']}: {b['problem']}" for b in problems])
            count = f"{len(empty)} texts are" if len(empty) > 1 else "1 text is"
            raise UserError(f"{count} empty:\n{shown}\nMend them, or leave them out with --skip_bad True.")
        report_skipped("texts", problems, skipped_file)
        out = out.select(np.setdiff1d(np.arange(len(rows)), empty))
    return out


def _normalise(normaliser: Normaliser, row: Row) -> Row:
    return {**row, "text": normaliser(row["text"], row.get("language", "en"))}


class BatchOrder(Sampler[list[int]]):
    """Which utterances form which batch, and in which order: a function of seed and epoch alone.

    A training that goes on in the middle of an epoch therefore needs only the number of batches that are done (`skip`).
    With several processes, each takes one of as many neighbouring batches; those that make the numbers even come twice.

    With `max_batch_length_s` utterances of like length come together. SpeechBrain's DynamicBatchSampler does the same with
    fixed buckets, whose bounds follow a log-normal law; on short utterances and large batches it left 12 to 49 % of
    the frames to padding (measured), where cutting the sorted list leaves a few percent for any distribution of lengths.

    Arguments
    ---------
    durations : numpy.ndarray
        Seconds, [count].
    sorting : str
        `ascending` or `descending` by duration, or `random` (a new order each epoch).
    batch_size : int
        Utterances a batch, where `max_batch_length_s` is None; otherwise the most that a batch may hold.
    max_batch_length_s : float or None
        Seconds of audio a batch may hold, padding included; a longer utterance stands alone.
    seed : int
        Seed of the order.
    rank, processes : int
        Which of how many processes this one is.
    repeat : bool
        Whether batches come twice to make the numbers even (training needs it, validation must not).

    groups : numpy.ndarray, optional
        A number for each utterance, [count]: only those of equal number share a batch.

    Raises
    ------
    UserError
        For another `sorting`.
    """

    def __init__(
        self,
        durations: np.ndarray,
        sorting: str,
        batch_size: int,
        max_batch_length_s: float | None = None,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        repeat: bool = True,
        groups: np.ndarray | None = None,
    ) -> None:
        if sorting not in SORTINGS:
            raise UserError(f"sorting: '{sorting}' is not {', '.join(SORTINGS[:-1])} or {SORTINGS[-1]}")
        self.durations, self.sorting, self.batch_size, self.seed = durations, sorting, batch_size, seed
        self.max_batch_length_s, self.rank, self.processes, self.repeat = max_batch_length_s, rank, processes, repeat
        self.groups = groups
        self.skip = 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Form the batches of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.durations
        if self.sorting == "random" and self.max_batch_length_s is None:
            order = rng.permutation(len(lengths))
        else:
            if self.sorting == "random":
                lengths = lengths * rng.uniform(1 - JITTER, 1 + JITTER, len(lengths))
            order = np.argsort(lengths, kind="stable")
        parts = (
            [order] if self.groups is None else [order[self.groups[order] == group] for group in np.unique(self.groups)]
        )
        batches = [batch for part in parts for batch in self._cut(part)]
        groups = [batches[i : i + self.processes] for i in range(0, len(batches), self.processes)]
        if self.repeat and len(groups[-1]) < self.processes:
            groups[-1] = [*groups[-1], *(batches * self.processes)[: self.processes - len(groups[-1])]]
        if self.sorting == "random":
            groups = [groups[i] for i in rng.permutation(len(groups))]
        elif self.sorting == "descending":
            groups = [[batch[::-1] for batch in group] for group in groups[::-1]]
        self.batches = [group[self.rank] for group in groups if self.rank < len(group)]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Cut an order into batches."""
        limit = self.max_batch_length_s
        if limit is None:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches, start, longest = [], 0, 0.0
        for i, duration in enumerate(self.durations[order].tolist()):
            longest = max(longest, duration)
            if i > start and (i - start == self.batch_size or longest * (i - start + 1) > limit):
                batches.append(order[start:i])
                start, longest = i, duration
        return [*batches, order[start:]]

    def padding_percent(self) -> float:
        """Share of the frames of this epoch's batches that is padding."""
        padded = sum(len(batch) * self.durations[batch].max() for batch in self.batches)
        return float(100 * (1 - sum(self.durations[batch].sum() for batch in self.batches) / padded))

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for batch in self.batches[skip:]:
            yield batch.tolist()

    def __len__(self) -> int:
        return len(self.batches)


class Labels(Protocol):
    """What turns an utterance into the numbers that a model learns."""

    def encode_row(self, row: Row) -> list[int]:
        """Return label indices or tokens."""


class Utterances(Dataset):
    """Items `id`, `wav` [time], `tokens` [labels], `text`, `duration`; what cannot be read has `id` and `problem` instead."""

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


def collate(items: list[dict[str, Any]]) -> PaddedBatch | SimpleNamespace:
    """Make a padded batch; `problems` lists what could not be read, and `id` is empty where nothing could."""
    good = [item for item in items if "problem" not in item]
    batch = PaddedBatch(good) if good else SimpleNamespace(id=[])
    batch.problems = [item for item in items if "problem" in item]
    return batch


def make_loader(rows: Rows, labels: Labels, order: BatchOrder, num_workers: int) -> DataLoader:
    """Return the loader of a training or validation set."""
    return Loader(
        Utterances(rows, labels),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def absolute_lengths(wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
    """Turn relative `wav_lens` [batch] into sample counts [batch] of `wavs` [batch, time]."""
    return (wav_lens.to(torch.float64) * wavs.shape[1]).round().long().clamp(max=wavs.shape[1])


def check_wavs(wavs: torch.Tensor | np.ndarray, wav_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return waveforms as models take them: float, [batch, time], with relative lengths [batch].

    Integers, as libraries read them from files, are brought to the range from -1 to 1.

    Raises
    ------
    UserError
        Where the samples or the lengths are of another kind than they must be.
    """
    wavs = torch.as_tensor(wavs)
    wav_lens = torch.as_tensor(wav_lens, device=wavs.device)
    if wavs.dim() == 1:
        wavs, wav_lens = wavs[None], wav_lens.reshape(1)
    if wavs.dim() != 2 or wav_lens.shape != wavs.shape[:1]:
        raise UserError(
            f"wavs must be [batch, time] and wav_lens [batch], not {list(wavs.shape)} and {list(wav_lens.shape)}"
        )
    if len(wav_lens) and (float(wav_lens.max()) > 1.0 + 1e-6 or float(wav_lens.min()) < 0):
        raise UserError(
            f"wav_lens are shares of the longest, from 0 to 1, not {float(wav_lens.max()):g}; divide samples by {wavs.shape[1]}"
        )
    if not wavs.is_floating_point():
        if wavs.dtype == torch.uint8:
            return (wavs.float() - 128) / 128, wav_lens
        if wavs.dtype not in (torch.int16, torch.int32):
            raise UserError(f"samples of type {wavs.dtype} are not audio; give floats from -1 to 1, or 16-bit integers")
        return wavs.float() / -torch.iinfo(wavs.dtype).min, wav_lens
    wavs = wavs.float()
    peak = float(wavs.abs().max()) if wavs.numel() else 0.0
    if peak > 250:  # no recording of floats, and hardly a silent one of 16-bit values
        raise UserError(f"samples up to {peak:g}: floats must be from -1 to 1; divide 16-bit values by 32768")
    if peak != peak:
        raise UserError("there are samples that are not finite (NaN)")
    return wavs, wav_lens


def zero_padding(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Set everything behind `lengths` [batch] to zero in `values` [batch, time, ...]."""
    if bool((lengths == values.shape[1]).all()):
        return values
    mask = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
    return values * mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
