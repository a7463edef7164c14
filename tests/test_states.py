"""The store of encoder states: exact in half precision, resumable, and it says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efficient_asr.data import StateStore
from efficient_asr.errors import UserError

META = {"states": 3, "dim": 4, "model": "m", "frames": "own"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, states = StateStore(tmp_path, META), {name: torch.randn(n, 3, 4) for name, n in (("a", 5), ("b", 1))}
    for name, value in states.items():
        store.append(name, value)
    again = StateStore(tmp_path)
    assert len(again) == 2 and "a" in again and "c" not in again
    for name, value in states.items():
        assert torch.equal(again.read(name), value.half()) and torch.equal(store.read(name), value.half())


@pytest.mark.parametrize("damage", ["half a line", "frames missing", "frames too many"])
def test_an_interrupted_pass_goes_on(damage: str, tmp_path: Path) -> None:
    store, value = StateStore(tmp_path, META), torch.randn(5, 3, 4)
    store.append("a", value)
    store.append("b", value + 1)
    index, states = tmp_path / "index.jsonl", tmp_path / "states.f16"
    if damage == "half a line":
        index.write_bytes(index.read_bytes()[:-4])
    elif damage == "frames missing":
        states.write_bytes(states.read_bytes()[:-10])
    else:
        states.write_bytes(states.read_bytes() + b"12345678")
    again = StateStore(tmp_path, META)
    assert ("b" in again) == (damage == "frames too many")
    again.append("c", value + 2)
    last = StateStore(tmp_path)
    assert torch.equal(last.read("a"), value.half()) and torch.equal(last.read("c"), (value + 2).half())


def test_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no encoder states at"):
        StateStore(tmp_path)
    store = StateStore(tmp_path, META)
    with pytest.raises(UserError, match="differ in model"):
        StateStore(tmp_path, META | {"model": "other"})
    assert store.check_room(1000) == 1000 * 3 * 4 * 2
    with pytest.raises(UserError, match="GB are free"):
        store.check_room(10**15)
    with pytest.raises(ValueError, match="does not end in"):
        store.append("a", torch.zeros(5, 2, 4))
