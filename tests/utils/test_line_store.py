"""A store of lines: continued after a kill, and never written by two processes at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import LineStore, atomic_write, read_complete_lines


def contents(path: Path) -> list:
    return [content for content, _, _ in read_complete_lines(path)]


@pytest.mark.parametrize("own_key_file", [False, True])
def test_it_goes_on_after_the_last_complete_line(own_key_file: bool, tmp_path: Path) -> None:
    path, key_file = tmp_path / "a.jsonl", tmp_path / "a.key" if own_key_file else None
    with LineStore(path, {"a": 1}, key_file=key_file) as store:
        for number in range(3):
            store.append(number)
    with open(path, "ab") as file:
        file.write(b'{"half": ')
    with LineStore(path, {"a": 1}, key_file=key_file) as store:
        assert store.count == 3
        store.append("ä")
        store.close()
        store.append(5)
    assert contents(path)[-5:] == [0, 1, 2, "ä", 5] and len(contents(path)) == (5 if own_key_file else 6)


@pytest.mark.parametrize("lines", [0, 2])
def test_of_two_processes_one_is_stopped_and_the_file_stays_whole(lines: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with LineStore(path, "key") as store:
        for number in range(lines):
            store.append(number)
    first, second = LineStore(path, "key"), LineStore(path, "key")
    first.append("first")
    with pytest.raises(UserError, match=r"a\.jsonl was changed by another process"):
        second.append("second")
    first.append("on")
    assert contents(path) == ["key", *range(lines), "first", "on"]
    path.unlink()
    with pytest.raises(UserError, match="changed by another process"):
        first.append("lost")
    assert not path.exists()


def test_a_line_for_which_the_disk_has_no_room_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with LineStore(path, "key") as store:
        store.append("first")
        file = store._file

        class Full:
            def write(self, line: bytes) -> int:
                return file.write(line[: len(line) // 2])

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        monkeypatch.setattr(store, "_file", Full())
        with pytest.raises(OSError, match="No space left on device"):
            store.append("a line that is too long")
        assert contents(path) == ["key", "first"] and path.read_bytes().endswith(b"\n")
        monkeypatch.setattr(store, "_file", file)  # there is room again
        store.append("last")
    assert contents(path) == ["key", "first", "last"]


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "model", os.replace
    for content in ("old", "new"):
        with atomic_write(folder) as partial:
            partial.mkdir()
            (partial / "a.txt").write_text(content)
    assert (folder / "a.txt").read_text() == "new"

    def fails_at_last(source: Path, target: Path) -> None:
        if Path(target) == folder and (Path(source) / "a.txt").read_text() == "newest":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_at_last)
    with pytest.raises(OSError, match="No space left"), atomic_write(folder) as partial:
        partial.mkdir()
        (partial / "a.txt").write_text("newest")
    assert (folder / "a.txt").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["model"]
