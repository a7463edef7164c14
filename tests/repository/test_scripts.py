"""The functions that the reproduction scripts share, with a stand-in for Python that records its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
-c) exit ;;
recipes/early_exit/set_rule.py)
    [ ! -e "${!#}" ] || exit 3
    mkdir "${!#}" && echo "${*:2}" >"${!#}/config.json" ;;
*) echo "$*" >>calls.txt
    while [ $# -gt 0 ]; do
        case $1 in
        --results_folder | --out) folder=$2 ;;
        --experiment) name=$2 ;;
        esac
        shift
    done
    [ -z "${FAIL:-}" ] || exit 1
    mkdir -p "$folder" && echo '{}' >"$folder/$name.json" ;;
esac
"""
SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/early_exit/sweep.sh
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the shared functions, and with the result of an experiment that was run elsewhere."""
    root = tmp_path / "a clone"
    for folder in ("scripts", "recipes/early_exit", "results/runs"):
        (root / folder).mkdir(parents=True)
    for file in ("scripts/setup.sh", "recipes/early_exit/sweep.sh", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / file, root / file)
    (root / "results/runs/one.json").write_text("{}")
    (root / "python").write_text(STAND_IN)
    (root / "python").chmod(0o755)
    return root


def run(clone: Path, body: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run a script that consists of the usual lines and `body`."""
    (clone / "scripts/reproduce_it.sh").write_text(SCRIPT + body)
    environment = os.environ | {"EFFICIENT_ASR_PYTHON": str(clone / "python")} | variables
    command = ["bash", os.path.relpath(clone / "scripts/reproduce_it.sh", folder or clone)]
    return subprocess.run(command, cwd=folder or clone, env=environment, capture_output=True, text=True, check=False)


def calls(clone: Path) -> list[str]:
    file = clone / "calls.txt"
    return file.read_text().splitlines() if file.is_file() else []


def test_results_of_the_repository_are_computed_again_and_own_ones_are_not(clone: Path) -> None:
    body = 'run one finetune_ctc mini/x --experiment one "$@"\n'
    assert run(clone, body, FAIL="1").returncode == 1 and len(calls(clone)) == 1
    assert run(clone, body).returncode == 0 and len(calls(clone)) == 2  # a failed run does not count
    again = run(clone, body)
    assert again.returncode == 0 and len(calls(clone)) == 2
    assert "== one is already done: results/runs/one*.json" in again.stdout
    assert run(clone, body.replace('"$@"', "--seed 7")).returncode == 0 and len(calls(clone)) == 3  # other options
    assert calls(clone)[-1].endswith("--results_folder results/runs --runtime_devices all --experiment one --seed 7")
    assert run(clone, body, RESULTS="elsewhere").returncode == 0 and (clone / "elsewhere/one.json").is_file()
    (clone / "elsewhere/one.json").unlink()
    assert run(clone, body, RESULTS="elsewhere").returncode == 0 and len(calls(clone)) == 5


def test_a_sweep_is_repeated_for_other_thresholds(clone: Path) -> None:
    body = "sweep e model data/dev.jsonl entropy {} --experiment e_entropy_0.1-dev\n"
    for thresholds, runs in (("0.1 0.2", 1), ("0.1 0.2", 1), ("0.1 0.2 0.3", 2)):
        assert run(clone, body.format(thresholds)).returncode == 0
        assert len(calls(clone)) == runs


def test_copies_with_another_exit_rule_follow_the_model(clone: Path) -> None:
    model = clone / "output/e/1986/model/config.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    body = 'exits "at once" e --rule entropy --threshold {}\nprintf "%s\\n" "${{systems[@]}}"\n'
    (clone / "output/e/at once").mkdir()  # left by an interrupted copy
    for threshold in ("0.1", "0.2"):
        done = run(clone, body.format(threshold))
        assert done.returncode == 0 and done.stdout == "at once=output/e/at once\n", done.stderr
        assert f"--threshold {threshold}" in (clone / "output/e/at once/config.json").read_text()
    for further in (False, True):
        (clone / "output/e/at once/unchanged").touch()
        if further:  # the model was trained further
            later = (clone / "output/e/at once/config.json").stat().st_mtime_ns + 1_000_000_000
            os.utime(model, ns=(later, later))
        assert run(clone, body.format("0.2")).returncode == 0
        assert (clone / "output/e/at once/unchanged").exists() != further


def test_paths_are_relative_to_where_a_script_is_started(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    body = 'echo "$EFFICIENT_ASR_DATA|$(absolute corpus)|$(absolute /corpus)|$(absolute "")"\n'
    done = run(clone, body, tmp_path, EFFICIENT_ASR_DATA="speech")
    assert done.stdout == f"{tmp_path}/speech|{tmp_path}/corpus|/corpus|\n", done.stderr


def test_a_missing_python_is_said_once(clone: Path) -> None:
    done = run(clone, "", EFFICIENT_ASR_PYTHON="", PYTHON_BASE="no such python", VENV=str(clone / "venv"))
    assert done.returncode == 2
    assert done.stderr == "error: Python 3.10 to 3.13 is required; set PYTHON_BASE=/path/to/python\n"
