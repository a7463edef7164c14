"""Estimates: which batches are timed, how their times are scaled, and that nothing else is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_librispeech
from speechbrain import Stage

from efficient_asr.data import BatchOrder, Rows
from efficient_asr.training import estimate
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run

FAST = ["--device", "cpu", "--measure_runtime", "False"]


def test_the_longest_batch_is_around_the_middle_of_every_part() -> None:
    assert estimate.middles(np.array([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0])) == [2, 5, 7, 4, 2, 2]
    assert estimate.middles(np.array([1.0])) == [0, 0, 0]
    assert estimate.mean([9.0, 1.0, 3.0, 9.0]) == 2.0


def test_the_sampled_batches_are_those_of_the_epoch() -> None:
    rows = Rows.of([{"id": f"u{i}", "duration": 1.0 + (7 * i) % 20} for i in range(20)])
    order = BatchOrder(rows.durations, "random", 3, 30.0, seed=1)
    few, names = estimate.sampled(rows, order)
    batches = [{f"u{i}" for i in batch} for batch in order.batches]
    assert len(names) == 2 + estimate.PARTS and all({*name} in batches for name in names)
    longest = max(order.batches, key=lambda batch: len(batch) * order.durations[batch].max())
    assert {*names[0]} == {*names[-1]} == {f"u{i}" for i in longest}
    again = estimate.order_of(few, names)
    assert [[few[i]["id"] for i in batch] for batch in again] == names
    without = few.select([i for i, row in enumerate(few) if row["id"] != names[0][0]])  # the recipe rejected one
    assert [without[i]["id"] for i in next(iter(estimate.order_of(without, names)))] == names[0][1:]


def test_times_are_scaled_by_hand() -> None:
    times = {
        "fit": [9.0, 1.0, 3.0, 9.0], "fit_wait": [9.0, 0.5, 1.5, 9.0], "valid": [9.0, 2.0, 4.0, 9.0],
        "valid_wait": [9.0, 0.2, 0.4, 9.0],
    }  # fmt: skip
    brain = SimpleNamespace(times=times, preparation_s=1.0, filled_before_training=("teacher_cache",))
    hparams = {"epoch_counter": SimpleNamespace(limit=3), "num_workers": 0}
    batches = {"train_split": 10, "valid_split": 5}
    found = estimate.scaled(brain, hparams, batches, 0.5, 0.1)
    assert found["training_h"] == pytest.approx(3 * 10 * (2.0 + 1.0) / 3600)
    assert found["validation_h"] == pytest.approx(3 * 5 * 3.3 / 3600) and found["preparation_h"] == 0.0
    found = estimate.scaled(brain, hparams | {"num_workers": 2}, batches, 0.5, 0.1)
    assert found["training_h"] == pytest.approx(3 * 10 * 2.0 / 3600)  # loading is faster than a step
    found = estimate.scaled(brain, hparams | {"teacher_cache": "somewhere"}, batches, 0.5, 0.1)
    assert found["preparation_h"] == pytest.approx((0.5 + 1.0) / 0.1 / 3600)


def test_an_estimate_counts_the_batches_and_leaves_only_its_file(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, stages = CTCBrain.compute_forward, []

    def slower(self: CTCBrain, batch: object, stage: Stage) -> object:
        stages.append(stage)
        time.sleep(0.2)
        return slow(self, batch, stage)

    monkeypatch.setattr(CTCBrain, "compute_forward", slower)
    file = tmp_path / "estimates" / "tiny.json"
    arguments = [str(tiny_yaml), *FAST, "--number_of_epochs", "7", "--batch_size", "2", "--estimate", str(file)]
    assert run(CTCBrain, arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["epochs"] == 7 and f"7 epochs of {found['batches_per_epoch']} batches" in printed
    assert 0.2 < found["batch_s"] < 5.0 and found["loading_s"] < 1.0  # validation and saving are no part of loading
    assert (
        stages.count(Stage.TRAIN) == 2 + min(estimate.PARTS, found["batches_per_epoch"]) and found["checkpoint_gb"] > 0
    )
    assert found["training_h"] == pytest.approx(
        7 * found["batches_per_epoch"] * (found["batch_s"] + found["loading_s"]) / 3600
    )
    assert found["validation_h"] > 0 and found["testing_h"] > 0 and found["memory_gb"] > 0.1
    parts = ("preparation_h", "training_h", "validation_h", "testing_h")
    assert found["total_h"] == pytest.approx(sum(found[part] for part in parts))
    assert not list(tmp_path.glob("output*")) and not (tmp_path / "results").exists()
    assert (
        estimate.summed([found, found]).startswith("2 trainings: ") and estimate.summed([]) == "no training to estimate"
    )


def test_an_estimate_leaves_the_run_and_its_folder_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_yaml), *FAST, "--number_of_epochs", "1"]
    assert run(CTCBrain, arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()}
    assert run(CTCBrain, [*arguments, "--estimate"]) == 0
    after = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()}
    assert before == after and [path.name for path in tmp_path.glob("output*")] == ["output"]


@pytest.mark.parametrize(("options", "message"), [
    (["--estimate", "True"], "'True' does not end in .json"), (["--estimate=x.yaml"], "'x.yaml' does not end in .json"),
    (["--estimate", "--test_only", "True"], "leave out --test_only and --debug"),
    (["--estimate", "--debug"], "leave out --test_only"),
    (["--estimate", "/proc/no/such.json"], "--estimate: cannot write"),
])  # fmt: skip
def test_mistakes_are_explained(
    options: list[str], message: str, tiny_yaml: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(CTCBrain, [str(tiny_yaml), *FAST, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_explained(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: CTCBrain, batch: object, stage: Stage) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CTCBrain, "compute_forward", full)
    assert run(CTCBrain, [str(tiny_yaml), *FAST, "--estimate"]) == 2
    assert "does not fit into the memory of the GPU; reduce batch_size" in capsys.readouterr().err
    assert not list(tmp_path.glob("output*"))


def wavlm_24(folder: Path) -> str:
    """A WavLM with the layers of the paper's, but tiny."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=24, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8), conv_stride=(16, 20),
        conv_kernel=(16, 20), num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.recipe
@pytest.mark.parametrize(("script", "batches"), [
    ("reproduce_downsampling.sh", {"downsampling_average_x2": 2}),
    ("reproduce_layer_removal.sh", {"distilhubert_bilstm": 2, "layer_removal_first_12": 3}),
    ("reproduce_early_exit.sh", {"early_exit": 4}),
])  # fmt: skip
def test_the_papers_settings_on_a_small_librispeech(script: str, batches: dict[str, int], tmp_path: Path) -> None:
    """Published settings but for the size of the model: data, training, validation, model folder, testing."""
    splits = {"train-clean-100": 7, "dev-clean": 3, "test-clean": 3, "test-other": 3}
    options = {
        "source": wavlm_24(tmp_path / "wavlm"), "head_neurons": 16, "num_workers": 0, "prepared_folder": tmp_path / "prepared",
    }  # fmt: skip
    folder = make_librispeech(tmp_path / "LibriSpeech", splits)
    environment = {
        "ESTIMATE": "1",
        "ESTIMATES": str(tmp_path / "estimates"),
        "ONLY": " ".join(batches),
        "VENV": sys.prefix,
    }
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = ["bash", f"scripts/{script}", str(folder), *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "estimates").glob("*.json")}
    assert {name: each["batches_per_epoch"] for name, each in found.items()} == batches
    assert all(each["epochs"] > 1 for each in found.values())
    assert f"{len(batches)} trainings: " in done.stdout.splitlines()[-1]
