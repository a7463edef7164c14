"""Common Voice in its official layout, on generated files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from conftest import chirp

from efficient_asr.corpora import prepare_corpus
from efficient_asr.corpora.common_voice import clean
from efficient_asr.data import read_manifest
from efficient_asr.utils.errors import UserError

HEAD = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "cv-corpus-7.0-2021-07-21" / "en"
    (root / "clips").mkdir(parents=True)
    for i in range(4):
        soundfile.write(root / "clips" / f"common_voice_en_{i}.mp3", chirp(0.5 + i / 4, 100, 400), 16000)
    sentences = ['Hello, "world" again!', "It’s a well-known café.", "Too short", "Four words stand here"]
    for split, picked in (("train", (0, 1, 2)), ("dev", (3,)), ("test", (3,))):
        lines = [f"speaker{i}\tcommon_voice_en_{i}.mp3\t{sentences[i]}\t{i + 2}\t0\t\t\t\ten\t\n" for i in picked]
        (root / f"{split}.tsv").write_text(HEAD + "".join(lines), encoding="utf-8")
    return root


def test_official_layout(folder: Path, tmp_path: Path) -> None:
    splits = prepare_corpus("common_voice", str(folder), tmp_path / "out", {})
    assert list(splits) == ["train", "dev", "test"]
    rows = list(read_manifest(splits["train"]))
    assert [row["text"] for row in rows] == ["HELLO WORLD AGAIN", "IT’S A WELL KNOWN CAFÉ"]
    assert rows[1] == rows[1] | {
        "id": "common_voice_en_1",
        "language": "en",
        "speaker": "speaker1",
        "up_votes": 3,
        "down_votes": 0,
    }
    assert rows[1]["duration"] == pytest.approx(0.75, abs=0.08)


def test_options_and_what_is_kept(folder: Path, tmp_path: Path) -> None:
    options = {"cleaning": "none", "splits": ["train"]}
    path = prepare_corpus("common_voice", str(folder), tmp_path / "out", options)["train"]
    assert [row["text"] for row in read_manifest(path)] == [
        'Hello, "world" again!',
        "It’s a well-known café.",
        "Too short",
    ]
    before = path.stat().st_mtime_ns
    prepare_corpus("common_voice", str(folder), tmp_path / "out", options)
    assert path.stat().st_mtime_ns == before
    prepare_corpus("common_voice", str(folder), tmp_path / "out", options | {"cleaning": "speechbrain"})
    assert path.stat().st_mtime_ns != before


@pytest.mark.parametrize(("text", "language", "accented", "expected"), [
    ("Straße, groß!", "de", True, "STRAßE GROß"), ("l'été déjà", "fr", True, "L' ÉTÉ DÉJÀ"),
    ("café isn't", "en", False, "CAFE ISN T"), ("¿Qué tal, señor?", "es", True, "QUÉ TAL SEÑOR"),
    ("नमस्ते, दुनिया!", "hi", True, "नमस्ते दुनिया"), ("e\u0301a", "en", True, "ÉA"),
    ("مَرْحَبًا", "ar", True, "مرحبا"), ("tAthair Ó Sé!", "ga-IE", True, "t-athair ó sé"),
])  # fmt: skip
def test_cleaning_rules(text: str, language: str, accented: bool, expected: str) -> None:
    assert clean(text, language, accented) == expected


def test_missing_and_damaged_clips_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "clips" / "common_voice_en_0.mp3").unlink()
    path = prepare_corpus("common_voice", str(folder), tmp_path / "out", {})["train"]
    with pytest.raises(UserError, match=r"train\.tsv:2: no such file"):
        read_manifest(path)
    assert len(read_manifest(path, skip_bad=True, skipped_file=tmp_path / "skipped.jsonl")) == 1
    assert json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[0])


def test_mistakes_are_explained(folder: Path, tmp_path: Path) -> None:
    for data, options, message in (
        (tmp_path, {}, "no folder 'clips'"), (folder, {"cleaning": "speechbrian"}, "Did you mean 'speechbrain'"),
        (folder, {"splits": ["validated"]}, "has no validated.tsv"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            prepare_corpus("common_voice", str(data), tmp_path / "out", options)
    (folder / "dev.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(UserError, match="no columns 'path' and 'sentence'"):
        prepare_corpus("common_voice", str(folder), tmp_path / "out", {})


@pytest.mark.parametrize("value", [0, -2])
def test_a_limit_that_is_no_number_of_utterances(value: int, tmp_path: Path) -> None:
    (tmp_path / "en" / "clips").mkdir(parents=True)
    with pytest.raises(UserError, match="max_train must be at least 1, or null for all utterances"):
        prepare_corpus("common_voice", str(tmp_path / "en"), tmp_path / "out", {"max_train": value})
