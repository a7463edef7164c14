"""Atomic writes, and JSON-lines files that an interrupted run can continue."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from efficient_asr.utils.errors import UserError


def expanded(path: str) -> str:
    """Return a path with environment variables and `~` replaced.

    Raises
    ------
    UserError
        If an environment variable is not set.
    """
    found = os.path.expanduser(os.path.expandvars(path))
    if "$" in found:
        raise UserError(f"'{path}' uses an environment variable that is not set")
    return found


@contextmanager
def atomic_write(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; it is renamed to `path` if the block ends without an error.

    Arguments
    ---------
    path : Path
        The file or folder; an existing one is replaced.
    shared : bool
        Whether several processes may write the same file at once. Otherwise leftovers of a killed process are overwritten.
    """
    path = Path(path)
    partial = path.with_name(f".{_short(path.name)}.partial{f'-{os.getpid()}' if shared else ''}")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir() and path.is_dir() and not path.is_symlink():
            _replace_folder(partial, path)
        else:
            if partial.is_dir():
                _remove(path)
            os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically; several processes may write it at once."""
    with atomic_write(Path(path), shared=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _replace_folder(new: Path, path: Path) -> None:
    """Replace a folder; the former one is deleted when the new one is in its place, and comes back if that fails."""
    before = path.with_name(f".{_short(path.name)}.before-{os.getpid()}")
    _remove(before)
    os.replace(path, before)
    try:
        os.replace(new, path)
    except OSError:
        if not path.exists():
            os.replace(before, path)
        raise
    _remove(before)


def _short(name: str) -> str:
    """Return a name of at most 100 bytes: the name itself, or its checksum; file systems allow 255 with what is added."""
    return name if len(os.fsencode(name)) <= 100 else hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_state(path: str | Path) -> str:
    """Return size and modification time of a file, which change when it is replaced."""
    state = os.stat(path)
    return f"{state.st_size} {state.st_mtime_ns}"


def state_of(path: str | Path) -> str | None:
    """Return the state of a file as in `file_state`, or None if there is no such file.

    What is computed from a file is kept with the state from before it was read: a file that is replaced meanwhile is then seen
    as changed.
    """
    try:
        return file_state(path)
    except OSError:
        return None


def is_unchanged(path: str | Path, state: str | None) -> bool:
    """Whether a file is there and in the state that `state_of` returned before."""
    return state is not None and state == state_of(path)


def read_complete_lines(path: Path) -> Iterator[tuple[Any, int, int]]:
    """Yield content, byte offset and size of each line of a JSON-lines file, up to the first truncated or invalid line."""
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


def differing_entries(path: Path, key: dict[str, Any]) -> list[str]:
    """Return the names of a key's entries that a JSON file has otherwise, or lacks; all of them if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return [name for name in key if not isinstance(found, dict) or found.get(name) != key[name]]


class LineStore:
    """A JSON-lines file, written line by line, so that an interrupted run continues after the last complete line.

    Arguments
    ---------
    path : Path
        The file. Its first line is the key.
    key : Any
        Plain data that the lines depend on; a file with another key is overwritten.
    accept : callable, optional
        Called with content, byte offset and size of each complete line after the key. The file is valid up to the first line for
        which it returns False or raises `KeyError`, `TypeError`, `ValueError` or `IndexError`.
    key_file : Path, optional
        File that stores the key, a dictionary, instead of the first line, so that `path` contains data only. If the keys differ,
        an error is raised and `path` is not overwritten.

    Attributes
    ----------
    count : int
        Number of accepted lines, without the key.

    Raises
    ------
    UserError
        If `key_file` contains another key; from `append`, if another process has written to the file.
    """

    def __init__(
        self,
        path: Path,
        key: Any,
        accept: Callable[[Any, int, int], bool | None] | None = None,
        key_file: Path | None = None,
    ) -> None:
        self.path, self.key, self.key_file = Path(path), json.loads(json.dumps(key)), key_file
        if key_file is not None:
            self._check_key_file()
        self._end = self._read(accept)
        self._file: BinaryIO | None = None

    def _check_key_file(self) -> None:
        if not self.path.is_file():
            atomic_write_text(self.key_file, json.dumps(self.key, indent=1) + "\n")
            return
        different = differing_entries(self.key_file, self.key)
        if different:
            raise UserError(
                f"{self.path} was created with a different {', '.join(different)}; use another file or delete this one"
            )

    def _read(self, accept: Callable[[Any, int, int], bool | None] | None) -> int:
        """Return the byte offset of the end of the last valid line."""
        end, self.count, self._size = 0, 0, self._size_now()
        for content, start, size in read_complete_lines(self.path) if self.path.is_file() else ():
            try:
                if start == 0 and self.key_file is None:
                    if content != self.key:
                        break
                elif accept is not None and accept(content, start, size) is False:
                    break
                else:
                    self.count += 1
            except (KeyError, TypeError, ValueError, IndexError):
                break
            end = start + size
        return end

    def _size_now(self) -> int | None:
        return self.path.stat().st_size if self.path.is_file() else None

    def append(self, content: Any) -> None:
        """Write a line; the first call opens the file and truncates it after the last valid line."""
        if self._size_now() != self._size:
            raise UserError(
                f"{self.path} was changed by another process; let only one write it, then rerun the command to continue"
            )
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "r+b" if self._end else "wb", buffering=0)
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._size = self._end
            if not self._end and self.key_file is None:
                self._write(self.key)
        self._write(content)

    def _write(self, content: Any) -> None:
        line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        if self._file.write(line) < len(line):  # the disk is full
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._end = self._size = self._size + len(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> LineStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder and in those below it, in bytes; files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
