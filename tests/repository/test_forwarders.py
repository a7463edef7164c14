"""Former paths of scripts and recipes work for one more release, with a warning."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from runs import run_script

FORMER = [
    p for p in (*ROOT.glob("scripts/*.py"), *ROOT.glob("recipes/*/train.py")) if "one more release" in p.read_text()
]


@pytest.mark.parametrize("path", FORMER, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_former_path_names_a_script_that_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    new = ast.get_docstring(ast.parse(text)).split("Moved to ")[1].split(";")[0]
    assert (ROOT / new).is_file() and new.split("/")[-1] in text.split("NEW = ")[1].split("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", [ROOT / "recipes" / "clsr_distillation" / "train.py"], ids=lambda p: p.parent.name)
def test_a_former_path_does_what_the_new_one_does(path: Path) -> None:
    new = ROOT / ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("Moved to ")[1].split(";")[0]
    outputs = [run_script(str(script.relative_to(ROOT)), "--help") for script in (path, new)]
    assert outputs[0].stdout == outputs[1].stdout and "warning" in outputs[0].stderr and not outputs[1].stderr


def test_the_class_of_the_published_example_is_where_it_was() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from efficient_asr.techniques.clsr_network import DistilWhisperForConditionalGeneration
    from efficient_asr.techniques.clsr import network

    assert DistilWhisperForConditionalGeneration is network.DistilWhisperForConditionalGeneration
    assert any("is now in" in str(warning.message) for warning in caught)
