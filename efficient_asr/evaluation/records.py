"""Records: one JSON line for every utterance that was scored, on the disk from the start.

A pass over a benchmark writes each record as soon as it is known, so it needs no more memory for ten thousand utterances than
for a hundred, and one that was interrupted goes on where it stopped. Several processes write a file each.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from efficient_asr.utils import distributed
from efficient_asr.utils.files import LineStore


class Records(Sequence[dict[str, Any]]):
    """Records in a temporary file of their own, read when they are asked for."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._offsets = array("q", [0])
        self.parts: PartFiles | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Write a record."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if self._file is None:
            self._file = tempfile.TemporaryFile()
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        self._file.flush()
        return json.loads(os.pread(self._file.fileno(), self._offsets[i + 1] - self._offsets[i], self._offsets[i]))

    def write(self, path: Path) -> None:
        """Write all records to a file of JSON lines."""
        with open(path, "w", encoding="utf-8") as file:
            for record in self:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def discard_parts(self) -> None:
        """Delete what an interrupted pass would have gone on from."""
        if self.parts is not None:
            self.parts.discard()


class PartFiles:
    """Where the processes of one pass, or of an earlier one that was interrupted, wrote their records.

    Arguments
    ---------
    stem : Path or None
        The files are `<stem>.part-<rank>`; None for a temporary folder.
    key : str
        What the records depend on; files with another key are of another model or benchmark and do not count.
    """

    def __init__(self, stem: Path | None, key: str) -> None:
        if stem is None:
            name = tempfile.mkdtemp() if distributed.if_main_process() else None
            self._folder = Path(distributed.ddp_broadcast(name))
            stem = self._folder / "records"
        else:
            self._folder = None
            stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem, self.key = stem, {"key": key}
        self.places: dict[str, tuple[Path, int, int]] = {}
        for path in self._paths():
            self._read(path)
        distributed.ddp_barrier()  # all have read before anyone writes

    def _paths(self) -> list[Path]:
        return sorted(self.stem.parent.glob(f"{self.stem.name}.part-*"))

    def _read(self, path: Path) -> LineStore:
        """Note where the records of a file are."""

        def note(content: Any, start: int, size: int) -> None:
            self.places[content["id"]] = (path, start, size)

        return LineStore(path, self.key, note)

    def open(self) -> LineStore:
        """Return the file of this process, for appending."""
        return self._read(self.stem.with_name(f"{self.stem.name}.part-{distributed.rank()}"))

    def merge(self, ids: Iterator[str]) -> Records:
        """Return all records, in the order of `ids`."""
        for path in self._paths():
            self._read(path)
        records = Records()
        files = {path: open(path, "rb") for path in self._paths()}
        for name in ids:
            path, offset, size = self.places[name]
            records.append(json.loads(os.pread(files[path].fileno(), size, offset)))
        for file in files.values():
            file.close()
        records.parts = self
        return records

    def discard(self) -> None:
        """Delete the files."""
        for path in self._paths():
            path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.rmdir()
