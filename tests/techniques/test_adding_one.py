"""docs/adding_a_technique.md is true: its four files, in a folder outside the package, are a technique."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from efficient_asr import load_transcriber
from efficient_asr.evaluation.result import Result
from efficient_asr.utils import technique
from efficient_asr.utils.errors import UserError

PAGE = ROOT / "docs" / "adding_a_technique.md"
FILES = ("decimation.py", "train.py", "decimation.yaml", "test_decimation.py")


def write_files(folder: Path) -> Path:
    """Write the four files of the page into a folder."""
    folder.mkdir()
    blocks = re.findall(r"```\w+ (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert tuple(name for name, _ in blocks) == FILES
    for name, text in blocks:
        (folder / name).write_text(text.replace("/path/to/efficient_asr", str(ROOT)), encoding="utf-8")
    return folder


def call(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "mine")


@pytest.mark.slow
def test_its_own_tests_pass(folder: Path) -> None:
    done = call(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_decimation.py")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_its_keys_have_limits(folder: Path) -> None:
    done = call(folder, "train.py", "decimation.yaml", "--decimation_factor", "0")
    assert done.returncode == 2 and "decimation_factor: expected an integer >= 1, got 0" in done.stderr


def test_a_module_that_is_not_there_or_declares_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no module 'no_such_technique'"):
        technique.add_technique("no_such_technique")
    with pytest.raises(UserError, match="'json' has no TECHNIQUE"):
        technique.add_technique("json")
    monkeypatch.setenv(technique.VARIABLE, "json")
    with pytest.raises(UserError, match="'json' has no TECHNIQUE"):
        technique.techniques()


def test_two_techniques_cannot_share_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = (folder / "decimation.py").read_text(encoding="utf-8").replace('name="decimation"', 'name="lora"')
    (folder / "twin_of_lora.py").write_text(twin, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(UserError, match=r"twin_of_lora and efficient_asr.techniques.lora both declare 'lora'"):
        technique.add_technique("twin_of_lora")


@pytest.mark.recipe
def test_it_trains_is_measured_saved_loaded_and_has_its_column(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--corpus_options", "{minutes: 3}", "--prepared_folder", str(tmp_path / "data"), "--number_of_epochs", "1"]
    fast = ["--runtime_repeats", "1", "--lm_path", "null"]
    for factor in ("1", "2"):
        done = call(folder, "train.py", "decimation.yaml", "--decimation_factor", factor, *small, *fast)
        assert done.returncode == 0, done.stdout + done.stderr
    outputs = {factor: folder / "output" / f"decimation_x{factor}" / "1986" for factor in (1, 2)}
    results = {factor: Result.load(path / "results" / f"decimation_x{factor}.json") for factor, path in outputs.items()}
    assert (results[1].technique, results[1].variant) == ("none", "baseline")
    assert (results[2].technique, results[2].variant) == ("decimation", "every 2.")
    assert results[2].details["samples_kept_percent"] == 50 and results[2].macs_g < 0.7 * results[1].macs_g

    model = outputs[2] / "model"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert [config[part]["type"] for part in ("frontend", "head")] == ["decimator", "repeating_head"]
    with pytest.raises(UserError, match=r"no technique declares 'decimator'.*EFFICIENT_ASR_TECHNIQUES"):
        load_transcriber(model)
    runs = tmp_path / "runs"
    runs.mkdir()
    for factor, path in outputs.items():
        for file in (path / "results").glob("*.json*"):
            (runs / f"{factor}-{file.name}").write_bytes(file.read_bytes())
    report = call(
        folder, str(ROOT / "scripts" / "report.py"), "--runs", str(runs), EFFICIENT_ASR_TECHNIQUES="decimation",
        PYTHONPATH=str(folder),
    )  # fmt: skip
    assert report.returncode == 0 and "samples kept, %" in report.stdout, report.stderr
    assert re.search(r"decimation every 2\. \| 50 \|", report.stdout)
    audio = json.loads((tmp_path / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])["audio"]
    said = call(
        folder, str(ROOT / "scripts" / "transcribe.py"), str(model), str(tmp_path / "data" / audio),
        EFFICIENT_ASR_TECHNIQUES="decimation", PYTHONPATH=str(folder),
    )  # fmt: skip
    assert said.returncode == 0 and "text" in json.loads(said.stdout), said.stderr
