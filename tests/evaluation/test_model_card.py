"""Model cards: what the hub reads, what is said of the results, and that nobody's README is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from efficient_asr.commands import run_command
from efficient_asr.evaluation.result import Result
from efficient_asr.models.hub import CARD_MARK
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run


def test_a_recipe_leaves_a_card_that_the_hub_reads(tiny_yaml: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--number_of_epochs", "1", "--measure_runtime", "False"]
    assert run(CTCBrain, [str(tiny_yaml), *options]) == 0
    folder = tmp_path / "output" / "model"
    result = Result.load(tmp_path / "results" / "tiny.json")
    card = ModelCard.load(folder / "README.md")
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    assert found["wer"].metric_value == round(result.wer_percent, 3)
    assert found["cer"].metric_value == round(result.cer_percent, 3)
    assert found["wer"].dataset_split == "test" and "4 utterances" in found["wer"].dataset_name
    assert card.data.pipeline_tag == "automatic-speech-recognition" and card.data.library_name == "efficient_asr"
    assert "base_model" not in card.data.to_dict()  # it was trained from nothing, whatever `source` says
    assert f"{result.wer_percent:.2f}" in card.text and "| – |" in card.text  # no runtime was measured


def test_the_command_writes_what_was_measured_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my_model" / "1986" / "model"
    folder.mkdir(parents=True)
    about = {"recipe": "clsr", "technique": "clsr + silence_cache", "variant": "experts"}
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper", "about": about}))
    assert run_command("model_card", [str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags[-2:] == ["clsr", "silence_cache"]
    assert "# my_model" in card.text and "Nothing was measured." in card.text and "model-index" not in str(card)

    (folder / "README.md").write_text("# Mine")
    assert run_command("model_card", [str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err and (folder / "README.md").read_text() == "# Mine"
    assert (
        run_command("model_card", [str(folder), "--overwrite"]) == 0 and CARD_MARK in (folder / "README.md").read_text()
    )
    (folder / "README.md").write_text("# Mine")
    (folder / "config.json").write_text("{")
    assert run_command("model_card", [str(folder), "--overwrite"]) == 2
    assert (folder / "README.md").read_text() == "# Mine"  # until there is a new one
    (tmp_path / "x.json").write_text("{}")
    assert run_command("model_card", [str(folder), "--results", str(tmp_path / "x.json")]) == 2
    assert "is not a result" in capsys.readouterr().err
    assert run_command("model_card", [str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
