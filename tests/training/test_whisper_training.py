"""Fine-tuning a Whisper: it learns, goes on exactly, leaves a directory that transformers reads, and says what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PLACES, ROOT_TAG, multilingual_whisper
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain

YAML = (
    PLACES
    + """
base: !include:{root}/hparams/_base/whisper.yaml
experiment: tiny_whisper
recipe: finetune_whisper
source: null
architecture: {{d_model: 32, encoder_layers: 1, heads: 2, window_s: 2.0, max_tokens: 32, dropout: 0.1}}
language: en
number_of_epochs: 2
batch_size: 2
lr: 0.003
runtime_repeats: 1
"""
)


def train(corpus: Path, out: Path, *options: str) -> int:
    out.mkdir(exist_ok=True)
    (out / "x.yaml").write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=out))
    return run(WhisperBrain, [str(out / "x.yaml"), "--device", "cpu", *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "output" / "model" / "model.safetensors")


def test_it_learns_and_is_measured_by_generation(corpus: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path / "a", "--number_of_epochs", "60", "--measure_runtime", "False", "--lr", "0.005") == 0
    result = json.loads((tmp_path / "a" / "results" / "tiny_whisper.json").read_text())
    assert result["wer_percent"] < 40 and result["technique"] == "none" and result["macs_g"] > 0
    folder = tmp_path / "a" / "output" / "model"
    utterances = (tmp_path / "a" / "results" / "tiny_whisper.utterances.jsonl").read_text().splitlines()
    heard = {json.loads(line)["id"]: json.loads(line)["hypothesis"] for line in utterances}
    from efficient_asr.data import load_audio

    (again,) = load_transcriber(str(folder), language="en").transcribe(
        load_audio(str(corpus / "u1.wav"))[None], torch.ones(1)
    )
    assert again.text == heard["u1"]


def test_the_loss_is_that_of_the_text_and_the_end_token() -> None:
    whisper = multilingual_whisper(seed=1)
    brain = object.__new__(type("Bare", (WhisperBrain,), {"model": whisper}))
    rows = [whisper.labels.encode_row({"text": text, "language": "en"}) for text in ("one two three", "nine")]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    batch = SimpleNamespace(tokens=(tokens, lengths / lengths.max()))
    found = brain.predicted(batch)
    for row, mask, target in zip(rows, found, tokens[:, 1:], strict=True):
        text = row[whisper.labels.prompt_length :]
        assert target[mask].tolist() == text and text[-1] == whisper.labels.end  # no prompt, no padding


def test_going_on_ends_where_an_uninterrupted_run_ends(corpus: Path, tmp_path: Path) -> None:
    short = ("--train_only", "True", "--label_smoothing", "0.1")
    assert train(corpus, tmp_path / "whole", *short) == 0
    assert train(corpus, tmp_path / "parts", *short, "--number_of_epochs", "1") == 0
    assert not all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "parts").values(), strict=False)
    )
    assert train(corpus, tmp_path / "parts", *short) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name


def test_a_frozen_encoder_stays(corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    options = ("--source", tiny_whispers["small"], "--freeze_encoder", "True", "--train_only", "True")
    assert train(corpus, tmp_path / "a", *options) == 0
    before, after = load_file(Path(tiny_whispers["small"]) / "model.safetensors"), weights(tmp_path / "a")
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "encoder." in name)
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "decoder.layers" in name)


def test_nothing_trained_measures_the_source(
    corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str], capsys
) -> None:
    assert train(corpus, tmp_path / "a", "--source", tiny_whispers["small"], "--test_only", "True") == 0
    assert "measuring" in capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "results" / "tiny_whisper.json").read_text())
    assert {r["batch_size"] for r in result["runtimes"]} == {1, 8}
    assert train(corpus, tmp_path / "b", "--test_only", "True") == 2
    assert "there is no trained model" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({"text": "word " * 40}, "more than 32 tokens"), ({"language": "nl"}, "the training manifest says nl (1 utterances)"),
])  # fmt: skip
def test_what_cannot_be_learned_from_is_named(change: dict, message: str, corpus: Path, tmp_path: Path, capsys) -> None:
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    rows[1] |= change
    (corpus / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(corpus, tmp_path / "a") == 2
    assert message in capsys.readouterr().err
    if "language" in change:
        assert train(corpus, tmp_path / "a", "--language", "manifest") == 2
        assert "does not know 'nl'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperatures", "0.2"], "temperatures: expected a list of numbers, got 0.2"),
        (["--long_audio", "pause"], "long audio: invalid method 'pause'"),
        (
            ["--long_audio", "sequential", "--encoder_padding", "silence_cache"],
            "long_audio: sequential decoding encodes",
        ),
        (["--long_audio", "sequential", "--encoder_padding", "0"], "long_audio: sequential decoding encodes"),
        (["--long_audio", "sequential", "--suppress", "False"], "long_audio: sequential decoding suppresses"),
    ],
)
def test_what_the_evaluation_would_refuse_is_refused_before_the_training(
    options: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(corpus, tmp_path / "a", *options) == 2
    assert message in capsys.readouterr().err and not list((tmp_path / "a").rglob("CKPT*"))


def test_audio_beyond_the_window_is_refused_or_left_out(corpus: Path, tmp_path: Path, capsys) -> None:
    architecture = "{d_model: 32, encoder_layers: 1, heads: 2, window_s: 1.2, max_tokens: 32}"
    assert train(corpus, tmp_path / "a", "--architecture", architecture) == 2
    assert "u1: 1.3 s (at the slowest speed) exceed the window of 1.2 s" in capsys.readouterr().err
    assert (
        train(corpus, tmp_path / "a", "--architecture", architecture, "--skip_bad", "True", "--train_only", "True") == 0
    )


def test_slow_speeds_and_validation_count_too(corpus: Path, tmp_path: Path, capsys) -> None:
    architecture = "{d_model: 32, encoder_layers: 1, heads: 2, window_s: 1.4, max_tokens: 32}"
    assert train(corpus, tmp_path / "a", "--architecture", architecture, "--speeds_percent", "[90, 100]") == 2
    assert "u1: 1.5 s (at the slowest speed)" in capsys.readouterr().err
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    rows[0]["text"] = "word " * 40
    (corpus / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(corpus, tmp_path / "b") == 2
    assert "u0: its text has more than 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "architecture", ["{d_modle: 3}", "{d_model: 32, heads: 3}", "{encoder: 'efficient_asr:mini_encoder'}"]
)
def test_an_impossible_architecture_is_explained(architecture: str, corpus: Path, tmp_path: Path, capsys) -> None:
    assert train(corpus, tmp_path / "a", "--architecture", architecture) == 2
    assert "architecture:" in capsys.readouterr().err


def test_rows_without_language_get_that_of_the_yaml(tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    from efficient_asr.models.whisper.model import Whisper

    model = Whisper.from_source(tiny_whispers["small"])
    model.labels.languages["nl"] = 5
    model.labels.default_language = "nl"
    assert (
        model.labels.encode_row({"text": "aan"})[1] == 5
        and model.labels.encode_row({"text": "on", "language": "en"})[1] != 5
    )


@pytest.mark.parametrize(("damage", "message"), [
    ("weights", "lacks"), ("generation", "no Whisper generation_config.json"), ("kind", "not a Whisper"),
    ("tokenizer", "tokenizer"),
])  # fmt: skip
def test_what_is_no_whole_whisper_is_refused(
    damage: str, message: str, tmp_path: Path, tiny_whispers: dict[str, str]
) -> None:
    import shutil

    from safetensors.torch import save_file

    from efficient_asr.models.whisper.model import Whisper
    from efficient_asr.utils.errors import UserError

    folder = Path(shutil.copytree(tiny_whispers["small"], tmp_path / "w"))
    if damage == "weights":
        tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "decoder.layers.0.fc1" not in k}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "generation":
        (folder / "generation_config.json").unlink()
    elif damage == "kind":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "wav2vec2"}))
    else:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=message):
        Whisper.from_source(str(folder))
