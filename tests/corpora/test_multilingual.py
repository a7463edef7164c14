"""FLEURS, Asterisk's prompts, subsets of Common Voice, and language filters: on generated files in the official layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from conftest import chirp

from efficient_asr.corpora import prepare_corpus
from efficient_asr.corpora.asterisk import read_texts, split_of
from efficient_asr.corpora.common_voice import most_voted
from efficient_asr.corpora.fleurs import download_split, whisper_code
from efficient_asr.data import read_manifest
from efficient_asr.utils.errors import UserError


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- FLEURS


@pytest.fixture
def fleurs(tmp_path: Path) -> Path:
    root = tmp_path / "fleurs"
    sentences = {
        "ca_es": [("7", "El gat, dorm.", "el gat dorm"), ("9", "Bon dia!", "bon dia")],
        "en_us": [("7", "The cat sleeps.", "the cat sleeps"), ("9", "Good morning!", "good morning")],
    }
    for language, lines in sentences.items():
        (root / language / "audio" / "test").mkdir(parents=True)
        text = ""
        for i, (number, raw, plain) in enumerate(lines):
            soundfile.write(root / language / "audio" / "test" / f"{i}.wav", chirp(0.5 + i / 4, 100, 400), 16000)
            text += f"{number}\t{i}.wav\t{raw}\t{plain}\t{'|'.join(plain)}\t8000\tFEMALE\n"
        (root / language / "test.tsv").write_text(text, encoding="utf-8")
    return root


def test_fleurs_in_its_official_layout(fleurs: Path, tmp_path: Path) -> None:
    found = prepare_corpus("fleurs", str(fleurs), tmp_path / "out", {"languages": ["ca_es"], "translations": True})
    assert set(found) == {"test", "test_ca_es"}
    rows = list(read_manifest(found["test"]))
    assert [row["text"] for row in rows] == ["el gat dorm", "bon dia"]
    assert [row["translation"] for row in rows] == ["The cat sleeps.", "Good morning!"]
    assert [row["language"] for row in rows] == ["ca", "ca"]
    assert rows[1]["duration"] == pytest.approx(0.75)
    raw = prepare_corpus("fleurs", str(fleurs), tmp_path / "raw", {"raw": True})
    assert [row["text"] for row in read_manifest(raw["test"])] == [
        "El gat, dorm.",
        "Bon dia!",
        "The cat sleeps.",
        "Good morning!",
    ]


def test_fleurs_says_what_is_missing(fleurs: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"languages": ["ca_se"]}, "ca_es"),
        ({"splits": ["tests"]}, "test"),
        ({"languages": ["ca_es"], "splits": ["train"]}, "train.tsv"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_corpus("fleurs", str(fleurs), tmp_path / "out", options)
    with pytest.raises(UserError, match="is not a folder"):
        prepare_corpus("fleurs", str(tmp_path / "nowhere"), tmp_path / "out", {})
    (fleurs / "ca_es" / "audio" / "test" / "1.wav").unlink()
    found = prepare_corpus("fleurs", str(fleurs), tmp_path / "out", {"languages": ["ca_es"]})
    with pytest.raises(UserError, match=r"test.tar.gz"):
        read_manifest(found["test"])
    (fleurs / "ca_es" / "test.tsv").write_text("7\tx.wav\ttext\n")
    with pytest.raises(UserError, match="line 1"):
        prepare_corpus("fleurs", str(fleurs), tmp_path / "out", {"languages": ["ca_es"]})


def test_fleurs_from_the_hub_lands_in_the_official_layout(fleurs: Path, tmp_path: Path) -> None:
    """The hub cannot be reached here: a stand-in gives entries as the package datasets does."""
    asked = []

    def fetch(config: str, split: str) -> list[dict]:
        asked.append((config, split))
        content = (fleurs / "ca_es" / "audio" / "test" / "0.wav").read_bytes()
        entry = {"id": 7, "raw_transcription": "El gat.", "transcription": "el gat", "num_samples": 8000, "gender": 1}
        return [entry | {"audio": {"path": "a.wav", "bytes": content}}]

    download_split(tmp_path / "new" / "ca_es", "dev", fetch)
    assert asked == [("ca_es", "dev")]
    found = prepare_corpus("fleurs", str(tmp_path / "new"), tmp_path / "out", {})
    assert [row["text"] for row in read_manifest(found["dev_ca_es"])] == ["el gat"]


def test_codes_of_whisper() -> None:
    assert [whisper_code(a) for a in ("ca_es", "cmn_hans_cn", "nb_no", "yue_hant_hk")] == ["ca", "zh", "no", "yue"]


# ---------------------------------------------------------------- Asterisk


def write_g722(path: Path, samples: np.ndarray) -> None:
    """Write G.722 without a header, as the packages have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        for start in range(0, len(samples) - 320, 320):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 320], format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    root = tmp_path / "packages"
    texts = "\ufeff; heading\n\nactivated: Activé maintenant ici\ndigits/7: sept\nbeep: [un bip]\n"
    texts += "lost: Sans fichier du tout\nbare line\n"
    doc = root / "usr/share/doc/asterisk-core-sounds-fr"
    doc.mkdir(parents=True)
    (doc / "core-sounds-fr.txt.gz").write_bytes(gzip.compress(texts.encode()))
    samples = (chirp(1.0, 200, 2000) * 20000).astype(np.int16)
    for name in ("activated", "digits/7", "beep"):
        write_g722(root / f"usr/share/asterisk/sounds/fr_CA_f_June/{name}.g722", samples)
    return root


def test_prompts_are_decoded_with_their_texts(prompts: Path, tmp_path: Path) -> None:
    found = prepare_corpus("asterisk", str(prompts), tmp_path / "out", {"languages": ["fr"]})
    rows = {row["id"]: row for name, path in found.items() if "_" not in name for row in read_manifest(path)}
    assert {key: row["text"] for key, row in rows.items()} == {
        "fr-activated": "Activé maintenant ici",
        "fr-digits-7": "sept",
    }
    row = rows["fr-activated"]
    assert row["language"] == "fr" and row["duration"] == pytest.approx(1.0, abs=0.05)
    wav, rate = soundfile.read(row["audio"])
    assert rate == 16000 and np.abs(wav).max() == pytest.approx(
        np.abs(chirp(1.0, 200, 2000)).max() * 20000 / 32768, rel=0.1
    )
    assert row["split"] == split_of("activé, MAINTENANT ici!")
    few = prepare_corpus("asterisk", str(prompts), tmp_path / "few", {"languages": ["fr"], "min_words": 3})
    assert {row["id"] for path in few.values() for row in rows_of(path)} == {"fr-activated"}


def test_prompts_say_what_is_missing(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get download asterisk-core-sounds-it-g722"):
        prepare_corpus("asterisk", str(prompts), tmp_path / "out", {"languages": ["it"]})
    with pytest.raises(UserError, match="en, es, fr, it, ru"):
        prepare_corpus("asterisk", str(prompts), tmp_path / "out", {"languages": ["de"]})
    (prompts / "asterisk-core-sounds-it-g722_1_all.deb").write_bytes(b"no package")
    with pytest.raises(UserError, match="cannot be unpacked"):
        prepare_corpus("asterisk", str(prompts), tmp_path / "out", {"languages": ["it"]})


def test_a_prompt_without_sound_is_named(prompts: Path, tmp_path: Path) -> None:
    (prompts / "usr/share/asterisk/sounds/fr_CA_f_June/activated.g722").write_bytes(b"")
    with pytest.raises(UserError, match=r"activated\.g722 cannot be decoded"):
        prepare_corpus("asterisk", str(prompts), tmp_path / "out", {"languages": ["fr"]})


def test_texts_and_splits(prompts: Path) -> None:
    texts = read_texts(prompts / "usr/share/doc/asterisk-core-sounds-fr/core-sounds-fr.txt.gz")
    assert texts == {"activated": "Activé maintenant ici", "digits/7": "sept", "lost": "Sans fichier du tout"}
    splits = [split_of(f"text number {i}") for i in range(2000)]
    assert splits.count("test") / 2000 == pytest.approx(0.15, abs=0.03)
    assert splits.count("dev") / 2000 == pytest.approx(0.10, abs=0.03)


# ---------------------------------------------------------------- Common Voice


@pytest.fixture
def common_voice(tmp_path: Path) -> Path:
    root = tmp_path / "cv"
    votes = {"ca": [(2, 0), (9, 1), (9, 0), (3, 0), (9, 0)], "th": [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0)]}
    for language, pairs in votes.items():
        (root / language / "clips").mkdir(parents=True)
        lines = ""
        for i, (up, down) in enumerate(pairs):
            soundfile.write(root / language / "clips" / f"{language}{i}.mp3", chirp(0.5, 100, 400), 16000)
            lines += f"s{i}\t{language}{i}.mp3\tsentence {i}\t{up}\t{down}\n"
        for split in ("train", "dev", "test"):
            (root / language / f"{split}.tsv").write_text("client_id\tpath\tsentence\tup_votes\tdown_votes\n" + lines)
    return root


def test_subsets_by_votes_and_their_ids(common_voice: Path, tmp_path: Path) -> None:
    options = {"languages": ["ca", "th"], "cleaning": "none", "max_train": 2, "max_valid": 1}
    found = prepare_corpus("common_voice", str(common_voice), tmp_path / "out", options)
    assert [row["id"] for row in read_manifest(found["train"])] == ["ca2", "ca4", "th3", "th4"]
    assert [row["id"] for row in read_manifest(found["dev_ca"])] == ["ca2"]
    assert len(read_manifest(found["test"])) == 10
    ids = json.loads((tmp_path / "out" / "ids.json").read_text())
    assert ids == {"ca": {"train": [2, 4], "validation": [2]}, "th": {"train": [4, 3], "validation": [4]}}
    # and back again from the file of ids, in the published layout
    again = {"languages": ["ca", "th"], "cleaning": "none", "ids_file": str(tmp_path / "out" / "ids.json")}
    other = prepare_corpus("common_voice", str(common_voice), tmp_path / "again", again)
    assert rows_of(other["train"]) == rows_of(found["train"])
    (tmp_path / "ids.json").write_text(json.dumps({"ca": {"train": [99]}}))
    with pytest.raises(UserError, match="row 99"):
        prepare_corpus(
            "common_voice", str(common_voice / "ca"), tmp_path / "x", {"ids_file": str(tmp_path / "ids.json")}
        )
    with pytest.raises(UserError, match="'th'"):
        prepare_corpus(
            "common_voice", str(common_voice / "th"), tmp_path / "x", {"ids_file": str(tmp_path / "ids.json")}
        )


def test_the_file_of_ids_says_what_the_manifests_hold(common_voice: Path, tmp_path: Path, monkeypatch) -> None:
    from efficient_asr.corpora import common_voice as module

    ids = tmp_path / "out" / "ids.json"

    def prepare(most: int | None) -> list[str]:
        found = prepare_corpus(
            "common_voice", str(common_voice / "ca"), tmp_path / "out", {"cleaning": "none", "max_train": most}
        )
        return [row["id"] for row in read_manifest(found["train"])]

    assert prepare(4) == ["ca1", "ca2", "ca3", "ca4"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "inspect_audio", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # interrupted
            prepare(2)
    assert prepare(4) == ["ca1", "ca2", "ca3", "ca4"]
    assert sorted(json.loads(ids.read_text())["ca"]["train"]) == [1, 2, 3, 4]
    assert len(prepare(None)) == 5 and not ids.exists()


def test_votes() -> None:
    fields = [{"up_votes": a, "down_votes": b} for a, b in (("2", "0"), ("5", "2"), ("5", "1"), ("", ""), ("5", "1"))]
    assert most_voted(fields, 3) == [2, 4, 1]
    assert most_voted(fields, 9) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- jsonl


def test_rows_of_one_language(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"u{i}",
            "audio": "a.wav",
            "duration": 1.0,
            "text": "x",
            "language": "de" if i % 2 else "fr",
            "split": "train" if i < 4 else "test",
        }
        for i in range(6)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifests = {"a": ["all.jsonl#language=de"], "b": ["all.jsonl#train&language=fr"], "c": ["all.jsonl#language=de/2"]}
    found = prepare_corpus("jsonl", str(tmp_path), tmp_path / "out", {"manifests": manifests})
    assert [[row["id"] for row in rows_of(found[name])] for name in "abc"] == [
        ["u1", "u3", "u5"],
        ["u0", "u2"],
        ["u1", "u5"],
    ]
    with pytest.raises(UserError, match="language=nl"):
        prepare_corpus("jsonl", str(tmp_path), tmp_path / "out", {"manifests": {"a": ["all.jsonl#language=nl"]}})
