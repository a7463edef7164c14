"""Fine-tuning for a language: the optimisers against closed forms, exact resumption, switches, and the saved language."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import speechbrain as sb
import torch
from conftest import PLACES, ROOT, ROOT_TAG, multilingual_whisper
from runs import run_script
from safetensors.torch import load_file

from efficient_asr.data import BatchOrder, Rows
from efficient_asr.models.log_mel import mask_features
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.limits import former_values
from efficient_asr.settings.yaml import load_hparams
from efficient_asr.techniques.finetuning.optimizers import OPTIMIZERS, make_optimizer
from efficient_asr.techniques.finetuning.report import optimizers_table
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.training.run import run
from efficient_asr.training.schedules import LinearSchedule
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils.errors import UserError

YAML = (
    PLACES
    + """
base: !include:{root}/hparams/_base/finetune_whisper.yaml
experiment: finetune
source: {source}
language: en
lr: 0.003
warmup_steps: 1
number_of_epochs: 3
epoch_batches: 2
batch_size: 2
precision: fp32
tensorboard: False
activation_checkpointing: False
train_only: True
"""
)


def steps(name: str, gradients: list[torch.Tensor], lr: float = 0.1, weight_decay: float = 0.0) -> torch.Tensor:
    """Return a weight of zeros after steps with these gradients."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = make_optimizer([weight], name, lr, weight_decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_adagrad_divides_by_the_root_of_the_summed_squares() -> None:
    first, second = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    expected = -0.1 * (first / (first.abs() + 1e-10) + second / ((first**2 + second**2).sqrt() + 1e-10))
    torch.testing.assert_close(steps("adagrad", [first, second]), expected, rtol=1e-12, atol=0)


def test_the_first_step_of_adamw_has_the_size_of_the_learning_rate() -> None:
    gradient = torch.randn(3, 4, dtype=torch.float64)
    expected = -0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(steps("adamw", [gradient]), expected, rtol=1e-9, atol=0)


def test_adafactor_keeps_rows_and_columns_of_the_squares() -> None:
    gradient = torch.randn(3, 4)
    square = gradient**2 + 1e-30  # at the first step, the running means are the squares themselves
    rows, columns = square.mean(1), square.mean(0)
    update = gradient / (rows[:, None] * columns[None] / rows.mean()).sqrt()
    update = update / (update.square().mean().sqrt()).clamp(min=1.0)
    torch.testing.assert_close(steps("adafactor", [gradient]), -0.1 * update, rtol=1e-5, atol=1e-7)


def test_an_unknown_optimiser_is_named_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"optimizer: 'adamw2' is not one of adamw, adagrad, adafactor.*adamw"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], "adamw2", 0.1)


def test_warm_up_can_be_given_in_steps() -> None:
    schedule = LinearSchedule(1.0, warmup_steps=4)
    schedule.total_steps = 10
    values = []
    for schedule.step in range(11):
        values.append(schedule.value)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and values[10] == 0
    assert values[7] == pytest.approx(0.5)


@pytest.mark.parametrize("limit", [None, 6.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_epochs_of_fixed_size_are_parts_of_the_passes(limit: float | None, world_size: int) -> None:
    durations = np.random.default_rng(1).uniform(1, 3, 23)

    def order(rank: int, epoch_batches: int | None) -> BatchOrder:
        return BatchOrder(durations, "random", 4, limit, 7, rank, world_size, epoch_batches=epoch_batches)

    def batches(sampler: BatchOrder, epochs: int) -> list[list[int]]:
        found = []
        for epoch in range(1, epochs + 1):
            sampler.set_epoch(epoch)
            found += list(sampler)
        return found

    for rank in range(world_size):
        whole, parts = batches(order(rank, None), 5), batches(order(rank, 3), 5)
        assert parts == whole[:15] and len(whole) >= 15
    sampler = order(0, 3)
    sampler.set_epoch(2)
    everything = list(sampler)
    sampler.skip = 2
    assert list(sampler) == everything[2:] and len(sampler) == 3


def test_masks_stay_within_an_utterance() -> None:
    mel = torch.ones(4, 8, 50)
    lengths = torch.tensor([5, 50, 20, 1])
    masked = mask_features(mel, 3, 10, 0, lengths)
    for row, length in zip(masked, lengths.tolist(), strict=True):
        assert bool((row[:, length:] == 1).all())
    assert float(masked[1].min()) == 0 and not torch.equal(masked[1], masked[2])
    assert torch.equal(mask_features(mel, 0, 10, 3, lengths), mel)  # no masks: nothing changes


def train(corpus: Path, out: Path, source: str, *options: str) -> Path:
    out.mkdir(exist_ok=True)
    (out / "x.yaml").write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=out, source=source))
    assert run(WhisperBrain, [str(out / "x.yaml"), "--device", "cpu", *options]) == 0
    return out / "output" / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_ends_with_the_same_weights(
    name: str, corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str]
) -> None:
    options = ("--optimizer", name, "--number_of_epochs", "3")
    whole = train(corpus, tmp_path / "whole", tiny_whispers["small"], *options)

    class StopsEarly(WhisperBrain):
        def on_stage_end(self, stage, stage_loss, epoch=None):
            super().on_stage_end(stage, stage_loss, epoch)
            if epoch == 2 and stage == sb.Stage.VALID:
                raise KeyboardInterrupt

    (tmp_path / "parts").mkdir()
    yaml = tmp_path / "parts" / "x.yaml"
    yaml.write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=tmp_path / "parts", source=tiny_whispers["small"]))
    assert run(StopsEarly, [str(yaml), "--device", "cpu", *options]) == 130
    assert same(whole, train(corpus, tmp_path / "parts", tiny_whispers["small"], *options))


def test_activation_checkpointing_changes_no_weight(
    corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str]
) -> None:
    plain = train(corpus, tmp_path / "plain", tiny_whispers["small"], "--number_of_epochs", "1")
    options = ("--number_of_epochs", "1", "--activation_checkpointing", "True")
    assert same(plain, train(corpus, tmp_path / "checkpointed", tiny_whispers["small"], *options))


def test_settings_that_adapted_models_have_too(tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    class Adapting(WhisperBrain):
        checkpoints_activations = False

        @classmethod
        def adapt(cls, model: Whisper, hparams: dict, rows: Rows) -> LoraWhisper:
            return LoraWhisper.adapt(model, 2, 2)

    path = tmp_path / "x.yaml"
    path.write_text(YAML.format(root=ROOT_TAG, corpus=tmp_path, out=tmp_path, source=tiny_whispers["small"]))
    assert Adapting.build(load_hparams(path, {"spec_augment": True})[0], Rows.of([])).spec_augment == (2, 40, 15)
    with pytest.raises(UserError, match="activation_checkpointing: the layers of this technique"):
        Adapting.build(load_hparams(path, {"activation_checkpointing": True})[0], Rows.of([]))


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (
            "finetune_whisper",
            {"lora_rank": 2, "freeze_encoder": True},
            "freeze_encoder: LoRA matrices would be trained",
        ),
        ("audio_context", {"lora_rank": 2, "trained_layers": "encoder"}, "trained_layers: LoRA matrices are in all"),
    ],
)
def test_lora_trains_in_all_layers(
    recipe: str, settings: dict, message: str, tmp_path: Path, tiny_whispers: dict[str, str]
) -> None:
    module = runpy.run_path(str(ROOT / "recipes" / recipe / "train.py"))
    brain = module["FinetuneBrain" if recipe == "finetune_whisper" else "Brain"]
    model = Whisper.from_source(tiny_whispers["small"])
    row = {"id": "a", "audio": "a.wav", "duration": 1.0, "text": "a"}
    with pytest.raises(UserError, match=message):
        brain.adapt(model, settings, Rows.of([row]))


def test_activation_checkpointing_computes_the_layers_again(tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(YAML.format(root=ROOT_TAG, corpus=tmp_path, out=tmp_path, source=tiny_whispers["small"]))
    calls = {}
    for switch in (False, True):
        hparams, _ = load_hparams(path, {"activation_checkpointing": switch})
        model, found = WhisperBrain.build(hparams, Rows.of([])).train(), []
        for layer in model.network.model.encoder.layers:
            layer.fc1.register_forward_hook(lambda *_, found=found: found.append(1))
        tokens = torch.tensor([[model.labels.start, 5, 6]])
        model(torch.randn(1, 8000), torch.tensor([8000]), tokens).sum().backward()
        calls[switch] = len(found)
    assert calls[True] == 2 * calls[False] > 0


def test_spec_augment_changes_training_only(corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    plain = train(corpus, tmp_path / "plain", tiny_whispers["small"], "--number_of_epochs", "1")
    masked = train(
        corpus, tmp_path / "masked", tiny_whispers["small"], "--number_of_epochs", "1", "--spec_augment", "True"
    )
    assert not same(plain, masked)
    whisper = Whisper.from_source(tiny_whispers["small"])
    wavs, lengths = torch.randn(2, 8000), torch.tensor([8000, 4000])
    before = whisper.features(wavs, lengths)
    whisper.spec_augment = (2, 40, 15)
    assert torch.equal(whisper.features(wavs, lengths), before)
    assert not torch.equal(whisper.train().features(wavs, lengths), before)


@pytest.mark.slow
def test_the_language_is_that_of_the_training_texts(corpus: Path, tmp_path: Path, multilingual_source: str) -> None:
    (tmp_path / "x.yaml").write_text(
        YAML.format(root=ROOT_TAG, corpus=corpus, out=tmp_path, source=multilingual_source)
    )
    options = ("--number_of_epochs", "1", "--language", "de", "--device", "cpu")
    done = run_script("recipes/finetune_whisper/train.py", tmp_path / "x.yaml", *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "model"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["language"], generation["task"]) == ("de", "transcribe")


def test_other_recipes_leave_the_language_open(corpus: Path, tmp_path: Path, multilingual_source: str) -> None:
    folder = train(corpus, tmp_path / "de", multilingual_source, "--number_of_epochs", "1", "--language", "de")
    assert json.loads((folder / "generation_config.json").read_text()).get("language") is None


def test_checkpoints_of_before_the_new_switches_are_resumed() -> None:
    former = former_values()
    assert former["spec_augment"] == former["activation_checkpointing"] == "False" and former["epoch_batches"] == "null"


@pytest.fixture
def multilingual_source(tmp_path: Path) -> str:
    """A random Whisper with several languages."""
    multilingual_whisper(0).save(tmp_path / "multilingual")
    return str(tmp_path / "multilingual")


@pytest.mark.recipe
def test_the_study_is_collected_and_drawn(tmp_path: Path) -> None:
    script, yaml = "recipes/finetune_whisper/train.py", "hparams/mini/finetune_whisper.yaml"
    common = (
        "--device",
        "cpu",
        "--corpus_options",
        "{minutes: 2}",
        "--prepared_folder",
        tmp_path / "data",
        "--measure_macs",
        "False",
    )
    before = tmp_path / "before"
    assert run_script(script, yaml, *common, "--test_only", "True", "--output_folder", before).returncode == 0
    runs = []
    for name in OPTIMIZERS:
        runs.append(tmp_path / name)
        short = ("--number_of_epochs", "2", "--epoch_batches", "2", "--optimizer", name, "--output_folder", runs[-1])
        done = run_script(script, yaml, *common, *short)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "results" / "optimizers" / "mini.json"
    collected = run_script("recipes/finetune_whisper/compare.py", *runs, "--before", before, "--out", out)
    assert collected.returncode == 0, collected.stderr
    study = json.loads(out.read_text())
    assert [run["optimizer"] for run in study["runs"]] == sorted(OPTIMIZERS)
    assert [each["step"] for each in study["runs"][0]["curve"]] == [2, 4]
    table = optimizers_table("mini", tmp_path / "results")
    assert f"| before | – | – | – | – | {study['before']['wer_percent']['test']:.2f} |" in table
    assert "synthetic speech, 4 steps of 16 utterances" in table
    assert (tmp_path / "results" / "plots" / "optimizers-mini.png").stat().st_size > 10_000
    refused = run_script("recipes/finetune_whisper/compare.py", before, "--before", before, "--out", out)
    assert refused.returncode == 2 and "no epochs" in refused.stderr and "Traceback" not in refused.stderr
