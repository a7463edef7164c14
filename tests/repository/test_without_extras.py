"""The quickstart's recipes where no optional package is installed: what needs one says so, everything else works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from efficient_asr.inference.language_model import kenlm_is_here

OPTIONAL = ("kenlm", "pygtrie", "peft", "sacrebleu", "silero_vad", "datasets", "tensorboard", "thop", "pynvml")
RECIPES = {
    "finetune_ctc": ["mini/finetune_ctc"],
    "downsampling": ["mini/downsampling", "--downsampling_technique", "average", "--downsampling_factor", "2"],
    "layer_removal": ["mini/layer_removal", "--kept_layers", "first_3"],
    "early_exit": ["mini/early_exit"],
    "finetune_whisper": ["mini/whisper", "--whisper", "small", "--test_only", "True"],
    "clsr_distillation": ["mini/clsr_js"],
    "lora": ["mini/lora"],
}


def run_without(packages: tuple[str, ...], folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a script in a Python that cannot import some packages."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"  # None in there means that there is none
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_hiding_hides(tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {OPTIONAL} if u.find_spec(n) is not None])"
    assert run_without(OPTIONAL, tmp_path / "site", "-c", code).stdout.strip() == "[]"


@pytest.mark.recipe
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_without_any_extra(recipe: str, tmp_path: Path) -> None:
    yaml, *options = RECIPES[recipe]
    done = run_without(
        OPTIONAL, tmp_path / "site", f"recipes/{recipe}/train.py", f"hparams/{yaml}.yaml", *options, "--debug", "--device", "cpu",
        "--output_folder", str(tmp_path / "out"), "--measure_runtime", "False", "--prepared_folder", str(ROOT / "data" / "mini"),
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    if recipe == "lora":
        assert done.returncode == 2 and "pip install 'efficient_asr[lora]'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result = json.loads(next((tmp_path / "out-debug" / "results").glob("*.json")).read_text())
    assert result["wer_percent"] is not None and result["wer_lm_percent"] is None and result["macs_g"] > 0
    if recipe in ("finetune_ctc", "downsampling", "layer_removal", "early_exit"):
        assert "needs kenlm" in done.stdout and "kenlm is not installed" in result["details"]["lm_note"]


@pytest.mark.slow
def test_a_language_model_that_was_asked_for_is_not_left_out(tmp_path: Path) -> None:
    done = run_without(
        ("kenlm",), tmp_path / "site", "recipes/finetune_ctc/train.py", "hparams/mini/finetune_ctc.yaml", "--lm_path",
        "efficient_asr:mini.arpa", "--output_folder", str(tmp_path / "out"), "--results_folder", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 2 and "needs kenlm" in done.stderr and "Traceback" not in done.stderr


def test_kenlm_is_found_where_it_is() -> None:
    pytest.importorskip("kenlm")
    assert kenlm_is_here()
