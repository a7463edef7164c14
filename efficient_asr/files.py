"""Files that appear whole, and JSON lines of which only whole ones count: what an interrupted run may leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def file_state(path: str | Path) -> str:
    """Return size and time of a file, which change when it is exchanged."""
    state = os.stat(path)
    return f"{state.st_size} {state.st_mtime_ns}"


def whole_lines(path: Path) -> Iterator[tuple[Any, int, int]]:
    """Yield content, first byte and size of the lines of a file of JSON lines, up to the first that is cut off or broken."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield content, start, len(line)
            start += len(line)
