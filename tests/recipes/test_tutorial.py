"""Every command of docs/tutorial.md, in order, in a folder of its own."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from efficient_asr.evaluation.result import Result

pytestmark = [pytest.mark.slow, pytest.mark.recipe]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    for name in ("recipes", "hparams", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    yaml, python = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL), re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_whisper.yaml").write_text(yaml[1])
    commands = re.findall(r"^    ((?:python|efficient-asr) .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 8
    if importlib.util.find_spec("ctranslate2") is None:
        commands = [command for command in commands if "faster-whisper" not in command]
    (tmp_path / "bin").mkdir()
    for name, module in (("python", ""), ("efficient-asr", "-m efficient_asr")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        if "--compare" in command:
            assert "points of WER" in done.stdout
    before, after = (Result.load(tmp_path / "my_results" / f"{name}.json") for name in ("before", "my_whisper"))
    assert before.benchmark_hash == after.benchmark_hash and after.wer_percent < before.wer_percent - 20
    skipped = (tmp_path / "my_results" / "before.skipped.jsonl").read_text()
    assert "lost.flac" in skipped and "empty text" in skipped
    assert "truncated" in next((tmp_path / "output" / "my_whisper").rglob("skipped_train.jsonl")).read_text()
    rows = list(csv.DictReader(open(tmp_path / "transcripts.csv", encoding="utf-8")))
    assert len(rows) > 40 and all(row["text"] for row in rows[:5])
    subtitles = (tmp_path / "subtitles" / "monday.srt").read_text()
    assert "-->" in subtitles and re.search(
        r"^(agent|customer): \w+", subtitles, re.MULTILINE
    )  # so small a model misses turns
    assert (tmp_path / "plots" / "my_data_test.svg").is_file()
    done = subprocess.run(
        [sys.executable, "-c", python[1]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert len(done.stdout.strip().splitlines()) == 2, done.stderr[-2000:]
