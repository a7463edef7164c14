"""Training logs, truncated to the last checkpoint when a training resumes, and training throughput."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from efficient_asr.utils import distributed

NAMES = ("train_log.txt", "nonfinite.jsonl", "throughput.jsonl")


class Logs:
    """The log files of a training.

    Arguments
    ---------
    folder : Path
        Folder of the log files.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = {name: Path(folder) / name for name in NAMES}

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each existing log file."""
        return {name: path.stat().st_size for name, path in self.paths.items() if path.is_file()}

    def cut_to(self, sizes: dict[str, int]) -> None:
        """Truncate the logs to the sizes stored in a checkpoint."""
        for name, path in self.paths.items() if distributed.if_main_process() else ():
            size = sizes.get(name, 0)
            if path.is_file() and path.stat().st_size > size:
                os.truncate(path, size)

    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add a line of JSON."""
        with open(self.paths[name], "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Throughput:
    """Measures the audio processed per second of training and the time spent waiting for data."""

    def __init__(self) -> None:
        self.audio_s = self.waiting_s = 0.0
        self.started = self.ready_at = time.perf_counter()

    def batch_came(self) -> None:
        """Record the end of the wait for a batch."""
        self.waiting_s += time.perf_counter() - self.ready_at

    def ready(self) -> None:
        """Record the start of the wait for the next batch."""
        self.ready_at = time.perf_counter()

    def entry(self, epoch: int, padding_percent: float) -> dict[str, Any] | None:
        """Return the log entry summed over all processes; None on all but the main process, or if no audio was read."""
        wall_s = time.perf_counter() - self.started
        audio_s, waiting_s = distributed.all_reduce([self.audio_s, self.waiting_s])
        if wall_s <= 0 or not audio_s or not distributed.if_main_process():
            return None
        world_size = distributed.world_size()
        return {
            "epoch": epoch,
            "processes": world_size,
            "audio_s": round(audio_s, 1),
            "wall_s": round(wall_s, 3),
            "audio_s_per_s": round(audio_s / wall_s, 1),
            "waiting_percent": round(100 * waiting_s / world_size / wall_s, 1),
            "padding_percent": round(padding_percent, 1),
        }
