"""Manifests that are no JSON lines, and tables of corpora: read, or refused with the line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import soundfile
from conftest import chirp

from efficient_asr import data
from efficient_asr.corpora import common_voice, fleurs, jsonl
from efficient_asr.utils.errors import UserError

EXPECTED = [("u0", "one, two", 1.0), ("u1", 'say "nine"', 1.0)]
CSV = 'id,audio,text,duration\nu0,a.wav,"one, two",1.0\nu1,a.wav,"say ""nine""",\n'
HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 200, 800), 16000)
    return tmp_path


def rows_of(path: Path) -> list[tuple]:
    return [(row["id"], row["text"], row["duration"]) for row in data.read_manifest(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", CSV.encode()), ("m.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
        ("m.tsv", b'id\taudio\ttext\nu0\ta.wav\tone, two\nu1\ta.wav\tsay "nine"\n'),
        ("m.json", json.dumps([{"id": i, "audio": "a.wav", "text": t} for i, t, _ in EXPECTED], indent=1).encode()),
        ("m.jsonl", json.dumps([{"id": i, "audio": "a.wav", "text": t} for i, t, _ in EXPECTED]).encode()),
        ("m.json", json.dumps({i: {"audio": "a.wav", "text": t} for i, t, _ in EXPECTED}, indent=1).encode()),
    ],
)  # fmt: skip
def test_other_manifests_are_read(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    assert rows_of(folder / name) == EXPECTED


def test_csv_through_the_corpus_jsonl(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(CSV.replace("u0", f"{split}0"))
    manifests = jsonl.prepare(str(folder), folder / "out")
    assert [row["id"] for row in data.read_manifest(manifests["train"])] == ["train0", "u1"]


def test_a_folder_of_manifests_in_other_formats(folder: Path, capsys: pytest.CaptureFixture) -> None:
    content = json.dumps([{"id": i, "audio": str(folder / "a.wav"), "text": t} for i, t, _ in EXPECTED])
    for name in ("arrays/train.json", "arrays/TEST.JSON", "mixed/dev.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "mixed" / "train.CSV").write_text(CSV.replace("a.wav", "../a.wav"))
    found = {name: jsonl.prepare(str(folder / name), folder / f"{name}_out") for name in ("arrays", "mixed")}
    assert [*found["arrays"]] == ["TEST", "train"] and [*found["mixed"]] == ["train"]
    assert rows_of(found["arrays"]["train"]) == rows_of(found["mixed"]["train"]) == EXPECTED
    assert "data_folder: .csv files are used; not used: dev.json" in capsys.readouterr().out


@pytest.mark.parametrize("sources", [None, 3, [3]])
def test_files_of_a_split_are_names(sources: object, folder: Path) -> None:
    with pytest.raises(UserError, match="corpus_options: manifests: 'train' must be a file or a list of files"):
        jsonl.prepare(str(folder), folder / "out", {"train": sources})


def test_a_cell_may_have_several_lines(folder: Path) -> None:
    text = "First line.\nWell, I do not know.\nYes, no, maybe."
    for columns, cells in (("audio,text,id", f'a.wav,"{text}",u0'), ("audio,text", 'a.wav,"one\ntwo\nthree"')):
        (folder / "m.csv").write_text(f"{columns}\n{cells}\n")
        assert len(rows_of(folder / "m.csv")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"PAR1....", "is a Parquet file"), ("m.csv", b"PK\x03\x04....", "is a spreadsheet or a zip archive"),
        ("m.jsonl", '{"audio": "a.wav"}'.encode("utf-16"), "is in UTF-16; save it as"),
        ("m.csv", b"audio;text\na.wav;one\n", "the columns are separated by semicolons"),
    ],
)  # fmt: skip
def test_other_kinds_of_files_are_named(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.read_manifest(folder / name)


def test_an_empty_cell_is_no_value_and_rare_languages_are_languages(folder: Path) -> None:
    (folder / "m.csv").write_text(
        "id,audio,sentence,text_machine,language\n0,a.wav,,heard,nhi\n1,a.wav,said,heard,German\n"
    )
    rows = data.read_manifest(folder / "m.csv", columns={"text": ["sentence", "text_machine"]}, skip_bad=False)
    assert [(row["text"], row["language"]) for row in rows] == [("heard", "nhi"), ("said", "de")]
    (folder / "m.csv").write_text("audio,text,language\na.wav,x,germann\n")
    with pytest.raises(UserError, match="language 'germann' is not a language"):
        data.read_manifest(folder / "m.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV + "u2,a.wav\n", "line 4: 2 cells instead of 4"), (CSV + 'u2,a.wav,"x" y,1\n', "line 4: not CSV"),
        (CSV.encode() + "u2,a.wav,é,1\n".encode("latin-1"), "line 4: not UTF-8"), ("", "holds no usable utterance"),
        (CSV + "u2,b.wav,x,1\n", "line 4: no such file"), (CSV + "u2,a.wav,x,soon\n", "line 4: duration 'soon'"),
    ],
)  # fmt: skip
def test_bad_lines_of_a_csv_are_named(content: str | bytes, message: str, folder: Path) -> None:
    (folder / "m.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        data.read_manifest(folder / "m.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", 'id,audio,text\nu0,a.wav,"one\nu1,a.wav,two\nu2,a.wav,three"\n', "unclosed quotation mark"),
        ("m.csv", "id,audio,text,text\nu0,a.wav,one,two\n", "duplicate column in the header"),
        (
            "m.json",
            '{"a": {"audio": "a.wav", "text": "x"}, "a": {"audio": "a.wav", "text": "y"}}',
            "duplicate key 'a'",
        ),
    ],
)
def test_what_would_lose_an_utterance_is_refused(name: str, content: str, message: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        data.read_manifest(folder / name)


def test_a_pipe_and_a_folder_are_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path, message in ((folder / "pipe", "is a pipe"), (folder, "is a folder"), (folder / "no", "no manifest at")):
        with pytest.raises(UserError, match=message):
            data.read_manifest(path)


def test_a_cell_may_be_long_and_a_record_may_hold_any_line_separator(folder: Path) -> None:
    text = "a\u2028b\u0085c " + "x" * 300_000
    (folder / "m.csv").write_text(f'id,audio,text\nu0,a.wav,"{text}"\n', encoding="utf-8")
    assert data.read_manifest(folder / "m.csv")[0]["text"] == text
    lines = list(data.table_rows(folder / "m.csv", ","))
    assert lines == [(2, {"id": "u0", "audio": "a.wav", "text": text})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"s\ta.wav\tcaf\xe9 one two\t1\t0\n", "train.tsv:3: not UTF-8"),
        (b"s\ta.wav\tone two\tthree\t1\t0\n", "train.tsv:3: 6 cells instead of 5"),
        (b"s\ta.wav\tone two\nthree\t1\t0\n", "train.tsv:3: 3 cells instead of 5"),
        (b"s\tb.wav\tone two three\t1\t0\n", "train.tsv:3: no such file"),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_common_voice_names_the_line(line: bytes, problem: str, bom: bytes, folder: Path) -> None:
    root = folder / "en"
    (root / "clips").mkdir(parents=True)
    (folder / "a.wav").rename(root / "clips" / "a.wav")
    good = "sp\ta.wav\t\u201cone\u201d two three\t2\t0\n".encode()
    (root / "train.tsv").write_bytes(bom + HEADER.encode() + good + line)
    manifest = common_voice.prepare(str(root), folder / "out", splits=["train"], max_train=5)["train"]
    with pytest.raises(UserError, match=problem):
        data.read_manifest(manifest)
    rows = data.read_manifest(manifest, skip_bad=True)
    assert [(row["speaker"], row["text"], row["up_votes"]) for row in rows] == [("sp", "ONE TWO THREE", 2)]


def test_common_voice_of_turkish_keeps_its_letters_apart() -> None:
    assert common_voice.clean("istanbul ısparta", "tr") == "İSTANBUL ISPARTA"


def test_fleurs_names_the_line(folder: Path) -> None:
    (folder / "ca_es" / "audio" / "test").mkdir(parents=True)
    (folder / "a.wav").rename(folder / "ca_es" / "audio" / "test" / "a.wav")
    good, short = "1\ta.wav\tUn, dos.\tun dos\tu n\t16000\tMALE\n", "2\ta.wav\tUn\n"
    (folder / "ca_es" / "test.tsv").write_text(good + short)
    manifest = fleurs.prepare(str(folder), folder / "out")["test"]
    with pytest.raises(UserError, match=r"test\.tsv:2: 3 cells instead of 7"):
        data.read_manifest(manifest)
    assert [row["text"] for row in data.read_manifest(manifest, skip_bad=True)] == ["un dos"]
