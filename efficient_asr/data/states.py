"""A store of encoder states on the disk: half precision, memory-mapped, appended to utterance by utterance.

A folder holds `states.f16` (all frames one after the other, each [states, dim]), `index.jsonl` (id, first frame, frames) and
`meta.json`. The index line is written after the frames, so that an interrupted pass goes on behind the last whole utterance.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efficient_asr.errors import UserError
from efficient_asr.files import whole_lines, write_whole

STATES, INDEX, META = "states.f16", "index.jsonl", "meta.json"


class StateStore:
    """Encoder states of many utterances.

    Arguments
    ---------
    folder : Path
        Where they are.
    meta : dict, optional
        What they depend on, for writing: `states` and `dim` are their shape; the rest is compared with what is there. None
        opens for reading.

    Raises
    ------
    UserError
        Where there is no store, or one of another model.
    """

    def __init__(self, folder: Path, meta: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / META
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found is None and meta is None:
            raise UserError(
                f"no encoder states at {folder}; scripts/label_routing.py with --states {folder} writes them"
            )
        if found is not None and meta is not None and found != meta:
            keys = [key for key in {**found, **meta} if found.get(key) != meta.get(key)]
            raise UserError(
                f"{folder} holds encoder states that differ in {', '.join(keys)}; name another folder or delete this one"
            )
        self.meta = found or meta
        self.shape = (self.meta["states"], self.meta["dim"])
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(meta, indent=1) + "\n")
        self.places: dict[str, tuple[int, int]] = {}
        self._frames = self._index_bytes = 0
        self._read_index()
        self._map: np.ndarray | None = None

    def _read_index(self) -> None:
        """Take in the lines whose frames are on the disk."""
        states = self.folder / STATES
        frames = states.stat().st_size // self.frame_bytes if states.is_file() else 0
        if not (self.folder / INDEX).is_file():
            return
        for entry, start, size in whole_lines(self.folder / INDEX):
            try:
                name, first, count = entry["id"], entry["first"], entry["frames"]
            except (KeyError, TypeError):
                break
            if first + count > frames:
                break
            self.places[name] = (first, count)
            self._frames, self._index_bytes = first + count, start + size

    @property
    def frame_bytes(self) -> int:
        """Size of one frame."""
        return 2 * self.shape[0] * self.shape[1]

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __len__(self) -> int:
        return len(self.places)

    def check_room(self, frames: int) -> int:
        """Return the bytes that so many more frames take.

        Raises
        ------
        UserError
            Where the disk has no room for them.
        """
        needed, free = frames * self.frame_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: the encoder states need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; keep only the "
                "frames of the audio itself (--frames own), fewer utterances, or compute them while training (states: null)"
            )
        return needed

    def append(self, name: str, states: torch.Tensor) -> None:
        """Add an utterance, [frames, states, dim]."""
        if tuple(states.shape[1:]) != self.shape:
            raise ValueError(f"{tuple(states.shape)} does not end in {self.shape}")
        data = states.half().contiguous().cpu().numpy()
        mode = "r+b" if (self.folder / STATES).is_file() else "wb"
        with open(self.folder / STATES, mode) as file:
            file.seek(self._frames * self.frame_bytes)
            data.tofile(file)
        line = json.dumps({"id": name, "first": self._frames, "frames": len(data)}).encode() + b"\n"
        mode = "r+b" if (self.folder / INDEX).is_file() else "wb"
        with open(self.folder / INDEX, mode) as file:
            file.truncate(self._index_bytes)
            file.seek(self._index_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.places[name] = (self._frames, len(data))
        self._frames, self._index_bytes = self._frames + len(data), self._index_bytes + len(line)
        self._map = None

    def read(self, name: str) -> torch.Tensor:
        """Return the states of an utterance, [frames, states, dim], in half precision."""
        if self._map is None:
            self._map = np.memmap(self.folder / STATES, np.float16, "r").reshape(-1, *self.shape)
        first, count = self.places[name]
        return torch.from_numpy(np.array(self._map[first : first + count]))
