"""Records: one JSON line for each scored utterance, written to disk immediately.

A scoring run writes each record as soon as it is available. Memory therefore does not grow with the number of utterances, and an
interrupted run resumes where it stopped. Each process writes its own file.
"""

from __future__ import annotations

import glob
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
    """Sequence of records in a temporary file, read on access."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._offsets = array("q", [0])
        self.parts: PartFiles | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Append a record."""
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
        """Write all records to a JSON Lines file."""
        with open(path, "w", encoding="utf-8") as file:
            for record in self:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def discard_parts(self) -> None:
        """Delete the part files that an interrupted run would resume from."""
        if self.parts is not None:
            self.parts.discard()


class PartFiles:
    """Record files written by the processes of this scoring run, or of an earlier, interrupted one.

    Arguments
    ---------
    stem : Path or None
        The files are `<stem>.part-<rank>`; None uses a temporary folder.
    key : str
        Identifies what the records depend on; files with another key belong to another model or benchmark and are ignored.
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
        distributed.ddp_barrier()  # every process reads before any process writes

    def _paths(self) -> list[Path]:
        return sorted(self.stem.parent.glob(f"{glob.escape(self.stem.name)}.part-*"))

    def _read(self, path: Path) -> LineStore:
        """Store the location of each record in a file."""

        def note(content: Any, start: int, size: int) -> None:
            self.places[content["id"]] = (path, start, size)

        return LineStore(path, self.key, note)

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Return the record of an utterance."""
        path, offset, size = self.places[name]
        with open(path, "rb") as file:
            file.seek(offset)
            return json.loads(file.read(size))

    def open(self) -> LineStore:
        """Open the file of this process for appending."""
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
        """Delete the part files."""
        for path in self._paths():
            path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.rmdir()
