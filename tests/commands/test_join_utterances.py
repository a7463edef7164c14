"""Strings of short utterances: each is used once a pass, speakers are not mixed, and texts and pauses are as asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from runs import run_script

from efficient_asr.data import SAMPLE_RATE, load_row, read_manifest, write_manifest

SCRIPT = "scripts/join_utterances.py"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    rows = []
    for i in range(12):
        wav = torch.full((800 + 80 * i,), 0.01 * (i + 1))
        soundfile.write(tmp_path / f"{i}.wav", wav.numpy(), SAMPLE_RATE, subtype="FLOAT")
        rows.append({
            "id": f"u{i}", "audio": f"{i}.wav", "duration": len(wav) / SAMPLE_RATE, "text": f"word{i}", "language": "en",
            "speaker": "ab"[i % 2], "split": "train" if i < 8 else "test",
        })  # fmt: skip
    return write_manifest(tmp_path / "digits.jsonl", rows)


def join(digits: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    done = run_script(SCRIPT, str(digits), "--out", str(out), *options)
    assert done.returncode == 0 and str(out / "manifest.jsonl") in done.stdout, done.stderr
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_every_utterance_is_used_once_a_pass_with_others_of_its_speaker(digits: Path, tmp_path: Path) -> None:
    rows = join(digits, tmp_path / "out", "--split", "train", "--passes", "2", "--fewest", "2", "--most", "3")
    assert Counter(name for row in rows for name in row["joined"]) == {f"u{i}": 2 for i in range(8)}
    for row in rows:
        assert {"ab"[int(name[1:]) % 2] for name in row["joined"]} == {row["speaker"]}
        assert row["text"] == " ".join(f"word{name[1:]}" for name in row["joined"])
        assert len(row["joined"]) <= 3 and row["split"] == "train" and row["language"] == "en"
    assert join(digits, tmp_path / "again", "--split", "train", "--passes", "2", "--fewest", "2", "--most", "3") == rows
    other = join(digits, tmp_path / "other", "--split", "train", "--seed", "7", "--fewest", "2", "--most", "3")
    assert [row["joined"] for row in other] != [row["joined"] for row in rows][: len(other)]


def test_the_audio_is_that_of_the_utterances_with_pauses(digits: Path, tmp_path: Path) -> None:
    gap = ("--gap_low_s", "0.05", "--gap_high_s", "0.05")
    join(digits, tmp_path / "out", "--split", "test", "--fewest", "2", "--most", "2", "--count", "1", *gap)
    (row,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    first, second = (load_row(each) for each in read_manifest(digits) if each["id"] in row["joined"])
    if row["joined"] != sorted(row["joined"], key=lambda name: int(name[1:])):
        first, second = second, first
    expected = torch.cat([first, torch.zeros(800), second])
    assert torch.allclose(load_row(row), expected, atol=2**-15)  # FLAC of 16 bits
    assert row["duration"] == pytest.approx(len(expected) / SAMPLE_RATE, abs=1e-4)


@pytest.mark.parametrize("options, message", [
    (["--fewest", "9"], "--fewest 9: expected a value from 0 to --most 8"),
    (["--gap_low_s", "0.5"], "--gap_low_s 0.5: expected a value from 0 to --gap_high_s 0.3"),
    (["--gap_high_s", "nan"], "--gap_low_s 0.05: expected a value from 0 to --gap_high_s nan"),
    (["--split", "dve"], "has no rows of split 'dve'"),
    (["--passes", "0"], "is not an integer >= 1"),
])  # fmt: skip
def test_mistakes_are_explained(options: list[str], message: str, digits: Path, tmp_path: Path) -> None:
    refused = run_script(SCRIPT, str(digits), "--out", str(tmp_path / "out"), *options)
    assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
