"""On-disk feature store: named tensors of many utterances, in one safetensors file per utterance.

A folder contains `meta.json`, which records what the features depend on, and `<ab>/<digest>.safetensors`, where the digest is
computed from the utterance's name. Files are written atomically, so an interrupted run resumes after the last complete file,
and several processes can write at the same time. Stores of the first version can still be read: they have `about.json` instead
of `meta.json`, and encoder states packed into one file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from efficient_asr.data.batches import iterate_batches
from efficient_asr.data.manifest import Row, Rows
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.files import atomic_write, atomic_write_text, read_complete_lines, state_of
from efficient_asr.utils.technique import current_value

Compute = Callable[[Row, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
META, FORMER_META = "meta.json", "about.json"


class FeatureStore:
    """Features of many utterances.

    Arguments
    ---------
    folder : Path
        Location of the store.
    meta : dict, optional
        What the features depend on, for writing; must match the metadata of an existing store. None opens for reading.
    what : str
        Name of the features, or the option that sets the folder; used in messages.
    added : tuple of str
        Keys of `meta` that were not always recorded: a store without them is accepted.

    Raises
    ------
    UserError
        If there is no store, or its metadata differs from `meta`.
    """

    def __init__(
        self,
        folder: Path,
        meta: dict[str, Any] | None = None,
        what: str = "features",
        added: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.what = Path(folder), what
        path = next((p for name in (META, FORMER_META) if (p := self.folder / name).is_file()), None)
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        if found is not None:
            found = {key: current_value(key, value) for key, value in found.items()}
            if meta is not None:
                meta = {key: value for key, value in meta.items() if key in found or key not in added}
        if found is None and meta is None:
            raise UserError(f"{what}: no feature store at {folder}")
        if found is not None and meta is not None and found != meta:
            keys = [key for key in {**found, **meta} if found.get(key) != meta.get(key)]
            raise UserError(f"{what}: {folder} differs in {', '.join(keys)}; choose another folder or delete this one")
        self.meta = found or meta
        if found is None:
            check_writable(self.folder, what)
            atomic_write_text(self.folder / META, json.dumps(meta, indent=1) + "\n")
        self._packed = _PackedStates.of(self.folder, self.meta)

    def path(self, name: str) -> Path:
        """Return the path of an utterance's file."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file() or (self._packed is not None and name in self._packed.places)

    def __len__(self) -> int:
        packed = len(self._packed.places) if self._packed is not None else 0
        return packed + sum(1 for _ in self.folder.glob("??/*.safetensors"))

    def holds(self, name: str, about: dict[str, str]) -> bool:
        """Return whether the store has an intact file for an utterance, written with the same `about`."""
        try:
            with safe_open(self.path(name), "pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError):
            return False
        before = {"part": about.get("part")}  # files of former versions do not say it
        return all((before | found).get(key) == value for key, value in about.items())

    def missing(self, rows: Rows, name: Callable[[Row], str]) -> Rows:
        """Return the utterances without an intact file that was computed from the audio file as it is now.

        Arguments
        ---------
        rows : Rows
            The utterances.
        name : callable
            `(row)` -> the name under which its features are stored.
        """
        return rows.select([i for i, row in enumerate(rows) if not self.holds(name(row), _audio_state(row))])

    def fill(self, rows: Rows, name: Callable[[Row], str], compute: Compute, desc: str) -> None:
        """Compute and write the features of utterances, one after the other, with the state of their audio files.

        Arguments
        ---------
        rows : Rows
            The utterances; see `missing`.
        name : callable
            As for `missing`.
        compute : callable
            `(row, wavs [1, time], wav_lens [1])` -> features.
        desc : str
            Shown with the progress.
        """
        quiet = not len(rows) or not distributed.if_main_process()
        progress = tqdm(total=len(rows), desc=desc, unit="utt", leave=False, mininterval=1, disable=quiet)
        with progress:
            for i in range(len(rows)):
                about = _audio_state(rows[i])  # before it is read: it may be replaced meanwhile
                [((row,), wavs, wav_lens)] = iterate_batches(rows.select([i]), 1)
                self.write(name(row), compute(row, wavs, wav_lens), about)
                progress.update()

    def check_room(self, needed: int, advice: str) -> None:
        """Check that the disk has enough free space before writing.

        Arguments
        ---------
        needed : int
            Required space in bytes.
        advice : str
            Remedy to show in the message.

        Raises
        ------
        UserError
            Naming the required and the free space.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.what}: {self.folder} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; {advice}"
            )

    def write(self, name: str, features: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> None:
        """Write the features of an utterance, with their own metadata `about`; an existing file is replaced."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in features.items()}
        with atomic_write(path, shared=True) as partial:
            save_file(tensors, partial, about)

    def read(self, name: str, only: str | None = None) -> dict[str, torch.Tensor]:
        """Return the features of an utterance, or just one of them.

        Raises
        ------
        UserError
            If there are none, or their file is damaged.
        """
        path = self.path(name)
        if self._packed is not None and not path.is_file() and name in self._packed.places:
            return {"states": self._packed.read(name)}
        try:
            if only is None:
                return load_file(path)
            with safe_open(path, "pt") as file:
                return {only: file.get_tensor(only)}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.what}: {path} cannot be read ({str(error).splitlines()[0]}); delete it, then rerun the step that wrote it"
            ) from None


def place_of(row: Row) -> str:
    """Return a name for the audio of an utterance: its file and the part of it, whatever its id is."""
    return f"{row['audio']}\0{row.get('offset', 0)}\0{row['duration']}"


def audio_digest(rows: Iterable[Row]) -> str:
    """Return a checksum of the places, sizes and modification times of all audio; audio that is missing has none of these."""
    digest = hashlib.sha256()
    for row in rows:
        state = state_of(row["audio"]) or "missing"
        digest.update(f"{place_of(row)}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _audio_state(row: Row) -> dict[str, str]:
    """Return what features depend on besides their name: the audio file as it is now, and the part of it."""
    part = {"part": f"{row['offset']} {row['duration']}"} if "offset" in row else {}
    return {"audio": state_of(row["audio"]) or "missing"} | part


class _PackedStates:
    """Encoder states in the format of the first version: `states.f16`, with all frames concatenated, and `index.jsonl`."""

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self.states, self.shape = folder / "states.f16", shape
        self.frames = self.states.stat().st_size // (2 * shape[0] * shape[1])
        self.places: dict[str, tuple[int, int]] = {}
        for entry, _, _ in read_complete_lines(folder / "index.jsonl"):
            if entry["first"] + entry["frames"] <= self.frames:
                self.places[entry["id"]] = (entry["first"], entry["frames"])

    @classmethod
    def of(cls, folder: Path, meta: dict[str, Any]) -> _PackedStates | None:
        """Open the packed states of a folder with the metadata `meta`; None if there are none."""
        if not ((folder / "states.f16").is_file() and (folder / "index.jsonl").is_file()):
            return None
        return cls(folder, (meta["states"], meta["dim"]))

    def read(self, name: str) -> torch.Tensor:
        """Return the states of an utterance, [frames, states, dim], in half precision."""
        first, count = self.places[name]
        values = np.memmap(self.states, np.float16, "r", shape=(self.frames, *self.shape))
        return torch.from_numpy(np.array(values[first : first + count]))
