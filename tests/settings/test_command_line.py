"""The command line: a text stays a text, names are never abbreviated, and mistakes name the key to use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from efficient_asr.settings.command_line import parse_command_line, read_value
from efficient_asr.settings.step import read_step
from efficient_asr.settings.yaml import load_hparams, training_settings
from efficient_asr.utils.errors import UserError

YAML = """
experiment: !PLACEHOLDER
data_folder: null       # where
output_folder: !ref out/<experiment>
number_of_epochs: 2
lr_head: 0.1
lr: !ref <lr_head>
max_batch_length_s: 32.0   # null for a fixed size
splits: [a]
options: {}
flag: False
head_optimizer: !name:torch.optim.Adam
    lr: !ref <lr_head>   # of the head
"""
TEXTS = [
    "/x/corpus #2",
    "@home",
    "*a",
    "&b",
    "%c",
    "!d",
    "a: b",
    "- x",
    "[x",
    "{y} z",
    "2024-01-01",
    "1e3",
    "007",
    "True",
    " sp ",
    "#x",
    "x:",
    "| a",
    "> a",
    "`tick`",
    "é",
    'a"b',
    "a'b",
    "$HOME/x",
    "a, b",
    "?",
    "~x",
]


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(YAML)
    return path


def load(yaml: Path, *arguments: str) -> dict:
    path, run_opts, overrides = parse_command_line([str(yaml), "--device=cpu", *arguments])
    return load_hparams(path, overrides, run_opts)[1]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_a_text(text: str, yaml: Path) -> None:
    found = load(yaml, "--experiment", text, f"--data_folder={text}")
    assert found["experiment"] == found["data_folder"] == text and found["output_folder"] == f"out/{text}"


def test_everything_else_keeps_its_meaning(yaml: Path) -> None:
    found = load(
        yaml, "--experiment", "e", "--number_of_epochs", "3", "--lr_head", "1e-4", "--splits", "[a, b]", "--options", "{x: [1]}",
        "--flag", "--max_batch_length_s", "null", "--data_folder", "null",
    )  # fmt: skip
    assert (found["number_of_epochs"], found["lr_head"], found["splits"]) == (3, 1e-4, ["a", "b"])
    assert found["options"] == {"x": [1]} and found["flag"] is True and found["max_batch_length_s"] is None
    assert found["data_folder"] is None and found["lr"] == 1e-4
    assert read_value("'7'") == "7" and read_value("-1.5") == -1.5 and read_value("~") is None


def test_a_date_in_the_yaml_file_is_a_name(yaml: Path) -> None:
    yaml.write_text(YAML.replace("!PLACEHOLDER", "2024-01-01"))
    assert load(yaml)["experiment"] == "2024-01-01"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adamw"], "no such key. Did you mean 'head_optimizer' or 'optimizer_step_limit'"),
        (["--prec", "bf16"], "'precision'"),
        (["--max_grad", "1"], "Did you mean 'max_grad_norm'"),
        (["--epochs", "3"], "Did you mean 'number_of_epochs'"),
        (["--learning_rate", "1"], "Did you mean 'lr_head'"),
        (["--head_optimizer.lr", "1"], "use --lr_head"),
        (["--options.x", "1"], "pass the whole value: --options"),
        (["--number_of_epochs", "null"], "expected int for number_of_epochs, got null"),
        (["--number_of_epochs"], "needs a value"),
        (["--device"], "needs a value"),
        (["--optimizer_step_limit", "0"], "optimizer_step_limit: '0' is not a whole number of at least 1"),
        (["--optimizer_step_limit=2.5"], "optimizer_step_limit: '2.5' is not a whole number of at least 1"),
        (["--splits", "[a"], "check for an unclosed bracket"),
        (["stray"], "cannot parse 'stray'"),
        (["--precision", "fp8"], "invalid choice"),
        (["--debug=maybe"], "not True or False"),
        (["--max_grad_norm", "-1"], "max_grad_norm: expected a number >= "),
    ],
)
def test_mistakes_name_the_key_to_use(arguments: list[str], message: str, yaml: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(yaml, "--experiment", "e", *arguments)


def test_objects_are_recorded_and_compared(yaml: Path) -> None:
    def settings(*arguments: str) -> dict[str, str]:
        path, run_opts, overrides = parse_command_line([str(yaml), "--experiment", "e", *arguments])
        return training_settings(path, overrides, run_opts)

    words = "!name:torch.optim.Adam lr: !ref <lr_head>"
    assert load(yaml, "--experiment", "e")["head_optimizer"] == settings()["head_optimizer"] == words
    changed = settings("--head_optimizer", "!name:torch.optim.SGD {lr: 1.0}")
    assert {key for key, value in settings().items() if changed[key] != value} == {"head_optimizer"}
    # a text with a number sign is compared as a whole
    yaml.write_text(YAML + "source: x\n")
    assert settings("--source", "/x #2")["source"] != settings("--source", "/x #3")["source"]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_take_no_abbreviations(script: Path) -> None:
    text = script.read_text()
    assert text.count("ArgumentParser(") == text.count("ArgumentParser(allow_abbrev=False") + text.count(
        "ArgumentParser(\n        allow_abbrev=False"
    )
    assert sys.version_info >= (3, 10)


def test_the_device_of_a_step_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that starts workers on a cluster with GPUs need not have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = str(ROOT / "hparams" / "mini" / "pseudo_labelling.yaml")
    step = read_step("label.py", "pseudo_labelling", [path, "--device", "cuda"])
    assert step.asked == "cuda"
    with pytest.raises(UserError, match="no usable GPU"):
        _ = step.device
    assert read_step("label.py", "pseudo_labelling", [path]).device == "cpu"
    with pytest.raises(UserError, match="invalid device 'gpu'"):
        read_step("label.py", "pseudo_labelling", [path, "--device", "gpu"])
