"""What commands write where nobody reads it, or where it cannot be shown; and language models that do not fit."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT, chirp

from efficient_asr.evaluation.result import Result
from efficient_asr.inference.language_model import LanguageModel, words_of
from efficient_asr.models.ctc import CTCModel
from efficient_asr.utils.errors import UserError

ARPA = ROOT / "efficient_asr" / "assets" / "mini.arpa"
LETTERS = ["", *" abcdefghijklmnopqrstuvwxyz'"]


@pytest.fixture
def command(tmp_path: Path, tiny_ctc: CTCModel) -> list[str]:
    tiny_ctc.save(tmp_path / "model")
    soundfile.write(tmp_path / "sch\u00f6n.wav", chirp(1.0, 200, 800), 16000)
    return [sys.executable, "scripts/transcribe.py", str(tmp_path / "model"), str(tmp_path / "sch\u00f6n.wav")]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_in_any_terminal_is_json(encoding: str, command: list[str]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "n\u00f6.wav"], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 2 and json.loads(done.stdout.decode(encoding))["audio"] == command[-1]
    assert b"Traceback" not in done.stderr and b"1 of 2 files could not be transcribed" in done.stderr


@pytest.mark.slow
def test_head_ends_it_quietly(command: list[str]) -> None:
    shell = f"set -o pipefail; {' '.join(command[:3])} {' '.join([command[-1]] * 4)} | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141) and len(done.stdout.splitlines()) == 1 and not done.stderr


@pytest.mark.slow
def test_silence_is_said(command: list[str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [[0.5, -0.5]] * 8000, 16000)
    done = subprocess.run(
        [*command[:3], str(tmp_path / "a.wav")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "its channels cancel each other out" in done.stderr


def test_records_with_any_line_separator_are_read_again(tmp_path: Path) -> None:
    fields = {"id": "a\u2028b\u0085c", "hypothesis": "x"}
    (tmp_path / "r.utterances.jsonl").write_text(json.dumps(fields, ensure_ascii=False) + "\n", encoding="utf-8")
    assert Result.load_utterances(type("R", (), {"path": tmp_path / "r.json"})()) == [fields]


def write_arpa(path: Path, words: list[str]) -> str:
    grams = "".join(f"-1.0\t{word}\t-0.3\n" for word in ["<unk>", "<s>", "</s>", *words])
    header = f"\\data\\\nngram 1={len(words) + 3}\nngram 2=1\n\n\\1-grams:\n"
    path.write_text(f"{header}{grams}\n\\2-grams:\n-0.5\t<s> </s>\n\n\\end\\\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("words", "labels", "case", "message"),
    [
        (["ONE", "TWO"], LETTERS, "lower", "written in upper case: use --lm_case upper"),
        (["one", "two"], LETTERS, "upper", "written in lower case: use --lm_case lower"),
        (["один", "два"], LETTERS, "lower", "uses another alphabet or language"),
        (["42", "7th", "one"], LETTERS, "lower", "uses another alphabet or language"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(
    words: list[str], labels: list[str], case: str, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("kenlm")
    with pytest.raises(UserError, match=message):
        LanguageModel(write_arpa(tmp_path / "lm.arpa", words), labels, case=case)


def test_a_zipped_or_indented_language_model_is_looked_at_too(tmp_path: Path) -> None:
    plain = Path(write_arpa(tmp_path / "lm.arpa", ["ONE", "TWO"])).read_bytes()
    (tmp_path / "a.arpa").write_bytes(b"\n\n" + plain)
    (tmp_path / "a.arpa.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "empty").write_bytes(b"")
    for name, words in (("a.arpa", ["ONE", "TWO"]), ("a.arpa.gz", ["ONE", "TWO"]), ("empty", [])):
        assert list(words_of(str(tmp_path / name))) == words


def test_a_language_model_that_fits_mostly_is_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("kenlm")
    path = write_arpa(tmp_path / "lm.arpa", ["one", "two", "three", "Four"])
    LanguageModel(path, LETTERS)
    assert "75 % of the words" in capsys.readouterr().err
    LanguageModel(str(ARPA), LETTERS)
    assert "% of the words" not in capsys.readouterr().err


def test_a_model_of_capitals_takes_a_lower_case_language_model(tmp_path: Path) -> None:
    pytest.importorskip("kenlm")
    model = LanguageModel(write_arpa(tmp_path / "lm.arpa", ["one"]), [label.upper() for label in LETTERS])
    assert "one".translate(model._back) == "ONE"


def test_words_of_a_binary(tmp_path: Path) -> None:
    content = (
        b"mmap lm http://kheafield.com/code format version 5\n\0"
        + bytes(99)
        + b"<unk>\0<s>\0</s>\0one\0\xc3\xa9t\xc3\xa9\0"
    )
    (tmp_path / "lm.bin").write_bytes(content)
    assert list(words_of(str(tmp_path / "lm.bin"))) == ["one", "\u00e9t\u00e9"]
