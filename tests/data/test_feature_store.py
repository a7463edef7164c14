"""The store of features: exact, resumable, it says what it lacks, and it reads what the first version wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efficient_asr.data import FeatureStore
from efficient_asr.utils.errors import UserError

META = {"states": 3, "dim": 4, "model": "m", "frames": "unpadded"}


def features(frames: int) -> dict[str, torch.Tensor]:
    return {"states": torch.randn(frames, 3, 4), "indices": torch.arange(frames)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, kept = FeatureStore(tmp_path, META), {"a": features(5), "b": features(1)}
    for name, value in kept.items():
        store.write(name, value)
    again = FeatureStore(tmp_path)
    assert len(again) == 2 and "a" in again and "c" not in again and again.meta == META
    for name, value in kept.items():
        found = again.read(name)
        assert found.keys() == value.keys() and all(torch.equal(found[key], value[key]) for key in value)


def test_an_interrupted_pass_continues_behind_what_is_complete(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, META)
    store.write("a", features(5), {"audio": "1"})
    (store.path("b").parent).mkdir(exist_ok=True)
    store.path("b").with_name(f".{store.path('b').name}.partial-7").write_bytes(b"half")  # as kill -9 leaves it
    again = FeatureStore(tmp_path, META)
    assert "a" in again and "b" not in again and len(again) == 1
    again.write("b", features(2))
    assert len(FeatureStore(tmp_path)) == 2


def test_a_file_counts_for_what_it_was_written_for_and_while_it_is_intact(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, META)
    store.write("a", features(5), {"audio": "1"})
    assert store.holds("a", {"audio": "1"}) and not store.holds("a", {"audio": "2"}) and not store.holds("b", {})
    store.path("a").write_bytes(b"broken")
    assert not store.holds("a", {"audio": "1"})
    with pytest.raises(UserError, match="delete it, then rerun"):
        store.read("a")


def test_a_key_added_later_is_compared_where_it_is_recorded(tmp_path: Path) -> None:
    FeatureStore(tmp_path / "former", META)
    assert FeatureStore(tmp_path / "former", META | {"audio": "1"}, added=("audio",)).meta == META
    with pytest.raises(UserError, match="differs in quantise"):
        FeatureStore(tmp_path / "former", META | {"quantise": "int8"}, added=("audio",))
    FeatureStore(tmp_path / "new", META | {"audio": "1"}, added=("audio",))
    with pytest.raises(UserError, match="differs in audio"):
        FeatureStore(tmp_path / "new", META | {"audio": "2"}, added=("audio",))


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder states: no feature store at"):
        FeatureStore(tmp_path, what="encoder states")
    store = FeatureStore(tmp_path, META)
    with pytest.raises(UserError, match="differs in model"):
        FeatureStore(tmp_path, META | {"model": "other"})
    store.check_room(1000, "take fewer")
    with pytest.raises(UserError, match="GB are free; take fewer"):
        store.check_room(10**15, "take fewer")


@pytest.mark.parametrize("damage", ["none", "half a line", "frames missing"])
def test_states_that_the_first_version_packed_are_read(damage: str, tmp_path: Path) -> None:
    states = {"a": torch.randn(5, 3, 4).half(), "b": torch.randn(2, 3, 4).half()}
    (tmp_path / "meta.json").write_text(json.dumps(META | {"frames": "own"}))
    packed = b"".join(value.numpy().astype(np.float16).tobytes() for value in states.values())
    lines = '{"id": "a", "first": 0, "frames": 5}\n{"id": "b", "first": 5, "frames": 2}\n'
    (tmp_path / "states.f16").write_bytes(packed[:-6] if damage == "frames missing" else packed)
    (tmp_path / "index.jsonl").write_text(lines[:-4] if damage == "half a line" else lines)
    store = FeatureStore(tmp_path, META)
    assert ("b" in store) == (damage == "none") and torch.equal(store.read("a")["states"], states["a"])
    store.write("c", features(1))
    assert len(FeatureStore(tmp_path)) == (3 if damage == "none" else 2)


def test_what_the_first_version_kept_of_a_teacher_is_read(tmp_path: Path) -> None:
    about = {"teacher": "t", "temperature": 1.0, "entries": 4}
    (tmp_path / "about.json").write_text(json.dumps(about))
    digest = hashlib.sha256(f"u1\0{[3, 5]}".encode()).hexdigest()[:24]
    (tmp_path / digest[:2]).mkdir()
    kept = {"log_probs": torch.randn(1, 5).half(), "indices": torch.arange(4).int()[None]}
    save_file(kept, tmp_path / digest[:2] / f"{digest}.safetensors", {"audio": "12 34"})
    store = FeatureStore(tmp_path, about)
    assert store.holds(f"u1\0{[3, 5]}", {"audio": "12 34"})
    assert torch.equal(store.read(f"u1\0{[3, 5]}")["log_probs"], kept["log_probs"])
