from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import make_librispeech

from efficient_asr.corpora import get_corpus, jsonl, librispeech, mini, prepare_corpus
from efficient_asr.data import read_manifest
from efficient_asr.utils.errors import UserError


def test_mini_is_deterministic_and_splits_share_no_voice(tmp_path: Path) -> None:
    a = prepare_corpus("mini", None, tmp_path / "a", {"minutes": 0.5})
    b = prepare_corpus("mini", None, tmp_path / "b", {"minutes": 0.5})
    voices = {}
    for split in a:
        assert a[split].read_text() == b[split].read_text()
        rows = read_manifest(a[split])
        voices[split] = {row["speaker"].split("+")[1] for row in rows}
        for row in rows:
            x, rate = soundfile.read(row["audio"])
            y, _ = soundfile.read(row["audio"].replace(str(tmp_path / "a"), str(tmp_path / "b")))
            assert rate == 16000 and np.array_equal(x, y)
            assert len(x) / rate == pytest.approx(row["duration"])
            assert np.abs(x).max() > 0.1 and row["synthetic"]
    assert not voices["train"] & voices["test"] and not voices["train"] & voices["dev"]
    assert not voices["dev"] & voices["test"]


def test_mini_voices_do_not_overlap() -> None:
    names = [name for split in mini.VOICES.values() for name in split]
    assert len(names) == len(set(names))


def test_mini_is_made_once(tmp_path: Path) -> None:
    first = prepare_corpus("mini", None, tmp_path, {"minutes": 0.2})["test"]
    before = first.stat().st_mtime_ns
    prepare_corpus("mini", None, tmp_path, {"minutes": 0.2})
    assert first.stat().st_mtime_ns == before
    prepare_corpus("mini", None, tmp_path, {"minutes": 0.3})
    assert first.stat().st_mtime_ns != before


def test_mini_language_model_knows_every_word() -> None:
    arpa = Path(mini.__file__).parent.parent / "assets" / "mini.arpa"
    unigrams = arpa.read_text().split("\\1-grams:")[1].split("\\2-grams:")[0]
    known = {line.split("\t")[1] for line in unigrams.splitlines() if "\t" in line}
    rng = random.Random(5)
    words = {word for _ in range(3000) for word in mini.make_sentence(rng).split()}
    assert words <= known


def test_jsonl_maps_columns_selects_splits_and_joins_files(corpus: Path, tmp_path: Path) -> None:
    lines = [
        {"path": "u0.wav", "said": "one", "split": "train"},
        {"path": "u1.wav", "heard": "two", "split": "train"},
        {"path": "u2.wav", "said": "three", "split": "test"},
    ]
    (corpus / "own.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    columns = {"audio": "path", "text": ["said", "heard"]}
    manifests = {"train": ["own.jsonl#train"], "dev": "own.jsonl#test", "all": ["own.jsonl"]}
    out = jsonl.prepare(str(corpus), tmp_path / "out", manifests, columns)
    assert [row["text"] for row in read_manifest(out["train"])] == ["one", "two"]
    assert [row["text"] for row in read_manifest(out["dev"])] == ["three"]
    assert len(read_manifest(out["all"])) == 3


def test_jsonl_finds_splits_by_itself(corpus: Path, tmp_path: Path) -> None:
    out = jsonl.prepare(str(corpus), tmp_path / "out")
    assert sorted(out) == ["dev", "test", "train"]
    assert len(read_manifest(out["train"])) == 4


def test_jsonl_broken_lines_are_reported_where_they_stand(corpus: Path, tmp_path: Path) -> None:
    with open(corpus / "train.jsonl", "a") as file:
        file.write("{broken\n")
    out = jsonl.prepare(str(corpus), tmp_path / "out")
    with pytest.raises(UserError, match=r"train\.jsonl:5: not JSON"):
        read_manifest(out["train"])
    assert len(read_manifest(out["train"], skip_bad=True)) == 4


def test_jsonl_broken_lines_of_a_file_with_splits_are_not_lost(corpus: Path, tmp_path: Path) -> None:
    """Which split they belonged to is unknown: each that the file names reports them."""
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    splits = ["train", "dev", "a\0b", "train"]
    lines = [json.dumps({**row, "split": split}) for row, split in zip(rows, splits, strict=True)]
    for path in corpus.glob("*.jsonl"):
        path.unlink()
    (corpus / "all.jsonl").write_text("\n".join([*lines, '{"id": "torn']))
    manifests = jsonl.prepare(str(corpus), tmp_path / "out")
    assert sorted(manifests) == ["dev", "train"]
    for split, count in (("train", 2), ("dev", 1)):
        with pytest.raises(UserError, match=r"all\.jsonl:3"):
            read_manifest(manifests[split])
        skipped = tmp_path / f"{split}.skipped"
        assert len(read_manifest(manifests[split], skip_bad=True, skipped_file=skipped)) == count
        assert len(skipped.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"manifests": {"train": "none.jsonl"}}, "no manifest at"),
        ({"manifests": {"train": "train.jsonl#other"}}, "no rows with split=other"),
        ({"columns": {"sound": "x"}}, "'sound' is not a manifest field"),
    ],
)
def test_jsonl_mistakes(corpus: Path, tmp_path: Path, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jsonl.prepare(str(corpus), tmp_path / "out", **kwargs)


def test_librispeech_layout(tmp_path: Path) -> None:
    root = make_librispeech(tmp_path / "LibriSpeech", {"train-clean-100": 6, "dev-clean": 3, "test-other": 4})
    out = librispeech.prepare(str(root), tmp_path / "out")
    assert sorted(out) == ["dev-clean", "test-other", "train-10h", "train-clean-100"]
    rows = read_manifest(out["train-clean-100"])
    assert len(rows) == 6
    assert rows[0]["text"].startswith("SAID NUMBER") and rows[0]["speaker"] in ("100", "101")
    assert sorted(round(row["duration"], 1) for row in rows) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert len(read_manifest(out["train-10h"])) == 6  # less than ten hours: all of it


def test_librispeech_of_another_folder_is_prepared_anew(tmp_path: Path) -> None:
    a = make_librispeech(tmp_path / "a", {"dev-clean": 2})
    b = make_librispeech(tmp_path / "b", {"dev-clean": 5})
    assert len(read_manifest(librispeech.prepare(str(a), tmp_path / "out")["dev-clean"])) == 2
    assert len(read_manifest(librispeech.prepare(str(b), tmp_path / "out")["dev-clean"])) == 5


def test_librispeech_that_was_unpacked_further_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "LibriSpeech"
    for unpacked in (2, 5):  # the second time with another chapter
        shutil.rmtree(folder, ignore_errors=True)
        root = make_librispeech(folder, {"dev-clean": unpacked})
        assert len(read_manifest(librispeech.prepare(str(root), tmp_path / "out")["dev-clean"])) == unpacked


def test_jsonl_does_not_overwrite_its_own_files(corpus: Path) -> None:
    before = (corpus / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="is the data_folder, whose files would be overwritten"):
        prepare_corpus("jsonl", str(corpus), corpus.parent / "." / corpus.name, {})
    assert (corpus / "train.jsonl").read_bytes() == before


def test_jsonl_survives_foreign_bytes_and_columns(corpus: Path, tmp_path: Path) -> None:
    own = {"audio": "u0.wav", "text": "one", "broken": False, "origin": "youtube"}
    (corpus / "odd.jsonl").write_bytes(json.dumps(own).encode() + b'\n{"audio": "u1.wav", "text": "caf\xe9"}\n')
    out = jsonl.prepare(str(corpus), tmp_path / "out", {"odd": "odd.jsonl"})["odd"]
    with pytest.raises(UserError, match=r"1 bad line .*\n  .*odd\.jsonl:2: not UTF-8"):
        read_manifest(out)
    rows = read_manifest(out, skip_bad=True)
    assert len(rows) == 1 and rows[0]["origin"] == "youtube"


def test_ten_hours_are_ten_hours_and_always_the_same() -> None:
    rows = [{"id": str(i), "duration": 12.0} for i in range(9000)]
    chosen = librispeech.ten_hours(rows)
    assert sum(row["duration"] for row in chosen) == pytest.approx(36000, abs=12)
    assert chosen == librispeech.ten_hours(rows) and chosen == sorted(chosen, key=lambda r: int(r["id"]))


def test_librispeech_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        librispeech.prepare(str(tmp_path / "none"), tmp_path)
    with pytest.raises(UserError, match="contains none of"):
        librispeech.prepare(str(tmp_path), tmp_path)
    (tmp_path / "empty" / "test-clean").mkdir(parents=True)
    with pytest.raises(UserError, match="contains no <speaker>"):
        librispeech.prepare(str(tmp_path / "empty"), tmp_path / "out")


def test_librispeech_reports_every_bad_file_and_reads_what_was_mended(tmp_path: Path) -> None:
    root = make_librispeech(tmp_path / "L", {"test-clean": 6})
    missing, damaged = sorted(root.rglob("*.flac"))[:2]
    content = missing.read_bytes()
    missing.unlink()
    whole = damaged.read_bytes()
    damaged.write_bytes(b"nothing")
    manifest = librispeech.prepare(str(root), tmp_path / "out")["test-clean"]
    with pytest.raises(UserError, match=r"(?s)2 bad lines.*trans.txt:1: no such file.*trans.txt:\d: cannot decode"):
        read_manifest(manifest)
    assert len(read_manifest(manifest, skip_bad=True)) == 4
    missing.write_bytes(content)
    damaged.write_bytes(whole)
    assert len(read_manifest(librispeech.prepare(str(root), tmp_path / "out")["test-clean"])) == 6


@pytest.mark.parametrize("torn", [False, True])
def test_librispeech_goes_on_where_it_stopped(torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_librispeech(tmp_path / "L", {"train-clean-100": 6})
    whole = librispeech.prepare(str(root), tmp_path / "whole")
    read, original = [], librispeech.read_chapter

    def read_chapter(transcript: Path) -> list:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(transcript)
        return original(transcript)

    monkeypatch.setattr(librispeech, "read_chapter", read_chapter)
    with pytest.raises(KeyboardInterrupt):
        librispeech.prepare(str(root), tmp_path / "out")
    progress = tmp_path / "out" / "train-clean-100.jsonl.progress"
    if torn:
        progress.write_bytes(progress.read_bytes()[:-10])
    first, chapters = list(read), len(list(root.rglob("*.trans.txt")))
    read[:] = [None] * 3
    librispeech.prepare(str(root), tmp_path / "out")
    assert read[3:][0] == (first[1] if torn else sorted(root.rglob("*.trans.txt"))[2])
    assert len(read) - 3 == chapters - (1 if torn else 2)
    for name in whole:
        assert (tmp_path / "out" / f"{name}.jsonl").read_text() == whole[name].read_text()
    assert not progress.exists()


@pytest.mark.real
def test_librispeech_on_real_utterances(real_data: Path, tmp_path: Path) -> None:
    """The 60 real utterances, put back into the official layout."""
    source = real_data / "librispeech_test_other"
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        speaker, chapter, _ = row["id"].split("-")
        folder = tmp_path / "LibriSpeech" / "test-other" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row['id']}.flac").symlink_to(source / row["audio"])
        with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as file:
            file.write(f"{row['id']} {row['text']}\n")
    out = librispeech.prepare(str(tmp_path / "LibriSpeech"), tmp_path / "out")
    found = {row["id"]: row for row in read_manifest(out["test-other"])}
    assert len(found) == 60
    for row in rows:
        assert found[row["id"]]["text"] == row["text"]
        assert found[row["id"]]["duration"] == pytest.approx(row["duration"], abs=0.01)


def test_unknown_corpus_and_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'librispeech'"):
        get_corpus("libri_speech")
    with pytest.raises(UserError, match="Did you mean 'minutes'"):
        prepare_corpus("mini", None, tmp_path, {"minuts": 3})
    for name, options, message in (
        ("mini", {"minutes": "ten"}, "minutes: expected a number, got 'ten'"),
        ("mini", {"minutes": True}, "minutes: expected a number, got True"),
        ("common_voice", {"max_train": "3k"}, "max_train: expected an integer, got '3k'"),
        ("common_voice", {"splits": {"train": 1}}, "splits: expected a list, got"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_corpus(name, None, tmp_path, options)
    with pytest.raises(UserError, match="no split 'trian'"):  # a text alone is a list of one, not of its letters
        prepare_corpus("fleurs", str(tmp_path), tmp_path, {"languages": "ca_es", "splits": "trian"})


def test_jsonl_reads_names_with_a_number_sign(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set #2"
    folder.mkdir()
    for name in ("part#1", "part#2"):
        rows = read_manifest(corpus / "test.jsonl")
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row | {"id": f"{name}{row['id']}"}) + "\n" for row in rows)
        )
    found = prepare_corpus("jsonl", str(folder), tmp_path / "out", {})
    assert {split: len(read_manifest(path)) for split, path in found.items()} == {"part#1": 4, "part#2": 4}
    half = {"manifests": {"test": [f"{folder}/part#1.jsonl#/2"]}}
    assert len(read_manifest(prepare_corpus("jsonl", str(folder), tmp_path / "half", half)["test"])) == 2
