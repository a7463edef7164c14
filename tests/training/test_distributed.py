"""Two processes under torchrun: one training, one Result, every utterance once; and what happens when one of them dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT_TAG
from runs import make_yaml, run_script, torchrun
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Started by torchrun in place of the recipe: kills one process in the middle of the second epoch, the first time.
KILLER = """
import os, signal, sys
from pathlib import Path
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
marker, original, calls = Path(sys.argv.pop(1)), CTCBrain.compute_objectives, [0]
def compute_objectives(self, predictions, batch, stage):
    calls[0] += 1
    if calls[0] == 6 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, predictions, batch, stage)
CTCBrain.compute_objectives = compute_objectives
sys.exit(run(CTCBrain))
"""


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training and three test utterances: neither number divides by two."""
    base = tmp_path_factory.mktemp("distributed")
    path = make_yaml(base)
    rows = (base / "corpus" / "train.jsonl").read_text().splitlines()
    more = json.dumps({**json.loads(rows[0]), "id": "u4"})
    (base / "corpus" / "train.jsonl").write_text("\n".join([*rows, more]))
    (base / "corpus" / "dev.jsonl").write_text("\n".join(rows[:3]))
    (base / "corpus" / "test.jsonl").write_text("\n".join(rows[1:]))
    return path


RECIPE = ["recipes/finetune_ctc/train.py"]


@pytest.fixture(scope="module")
def uninterrupted(yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(RECIPE, folder, yaml)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("result: ") == 1
    return folder


def test_every_utterance_is_evaluated_once_and_the_score_is_that_of_one_process(
    yaml: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    result = json.loads((uninterrupted / "results" / "tiny.json").read_text())
    assert result["utterances"] == 3
    alone = [
        *RECIPE, str(yaml), "--device", "cpu", "--output_folder", str(uninterrupted / "output"),
        "--results_folder", str(tmp_path), "--batch_size", "1", "--measure_runtime", "False", "--test_only", "True",
    ]  # fmt: skip
    done = run_script(*alone)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "tiny.json").read_text())
    for key in ("wer_percent", "cer_percent", "substitutions", "benchmark_hash", "macs_g"):
        assert again[key] == result[key]
    lines = [(folder / "tiny.utterances.jsonl").read_text() for folder in (tmp_path, uninterrupted / "results")]
    assert lines[0] == lines[1]


def test_throughput_counts_the_audio_of_all_processes(uninterrupted: Path) -> None:
    lines = (uninterrupted / "output" / "throughput.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["processes"] == 2
    # Five batches of one, and one of them again to make the number even.
    assert 1.0 + 1.31 + 0.7 + 1.137 + 1.0 + 0.7 - 0.1 <= first["audio_s"] <= 1.0 + 1.31 + 0.7 + 1.137 + 1.0 + 1.31 + 0.1


def test_a_worker_that_dies_ends_the_run_and_the_next_start_resumes(
    yaml: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    done = torchrun([str(script), str(tmp_path / "marker")], tmp_path, yaml)
    assert done.returncode != 0 and "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
    done = torchrun([str(script), str(tmp_path / "marker")], tmp_path, yaml)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout and done.stdout.count("result: ") == 1
    weights = [load_file(folder / "output/model/model.safetensors") for folder in (tmp_path, uninterrupted)]
    assert all((value == weights[1][name]).all() for name, value in weights[0].items())
    logs = [(folder / "output/train_log.txt").read_text() for folder in (tmp_path, uninterrupted)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train_split", "trian", "error: train_split: the corpus has no split 'trian'; it has dev, test, train"),
        (
            "--data_folder",
            "/nowhere",
            "error: data_folder: '/nowhere' is not a folder",
        ),  # which the main process finds alone
    ],
)
def test_a_mistake_is_said_and_ends_all_processes(
    option: str, value: str, message: str, yaml: Path, tmp_path: Path
) -> None:
    done = torchrun(RECIPE, tmp_path, yaml, option, value)
    assert done.returncode != 0 and message in done.stderr
    assert "exitcode  : 2" in done.stderr and "efficient_asr/training/run.py" not in done.stderr  # no traceback of ours


def test_another_number_of_processes_is_a_change_of_settings(yaml: Path, uninterrupted: Path, tmp_path: Path) -> None:
    alone = [
        *RECIPE, str(yaml), "--device", "cpu", "--output_folder", str(uninterrupted / "output"),
        "--results_folder", str(tmp_path), "--number_of_epochs", "9", "--batch_size", "1",
    ]  # fmt: skip
    done = run_script(*alone)
    assert done.returncode == 2 and "processes: 2 before, 1 now" in done.stderr


# In place of the recipe: all audio of one process's batch is gone once the training has begun.
VANDAL = """
import sys
from pathlib import Path
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
audio, original = Path(sys.argv.pop(1)), CTCBrain.on_fit_start
def on_fit_start(self):
    original(self)
    audio.unlink(missing_ok=True)
CTCBrain.on_fit_start = on_fit_start
sys.exit(run(CTCBrain))
"""


def test_a_batch_that_one_process_cannot_read_stops_none(tmp_path: Path) -> None:
    path = make_yaml(tmp_path)
    rows = (tmp_path / "corpus" / "train.jsonl").read_text().splitlines()
    for name in ("dev", "test"):
        (tmp_path / "corpus" / f"{name}.jsonl").write_text(rows[0])
    script = tmp_path / "vandal.py"
    script.write_text(VANDAL)
    done = torchrun([str(script), str(tmp_path / "corpus" / "u1.wav")], tmp_path, path, "--skip_bad", "True")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out: utterance 'u1'" in done.stderr


# In place of the recipe: SIGTERM to both processes in the validation, which one of them has finished already.
STOPPER = """
import os, signal, sys, time
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
original = CTCBrain.evaluate_batch
def evaluate_batch(self, batch, stage):
    if os.environ["RANK"] == "1":
        time.sleep(2)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)
    return original(self, batch, stage)
CTCBrain.evaluate_batch = evaluate_batch
sys.exit(run(CTCBrain))
"""


def test_a_signal_in_validation_loses_nothing(yaml: Path, tmp_path: Path) -> None:
    script = tmp_path / "stopper.py"
    script.write_text(STOPPER)
    done = torchrun([str(script)], tmp_path, yaml, "--ckpt_interval_steps", "0", "--test_batch_size", "1")
    assert done.returncode != 0
    saved = [path.name for path in (tmp_path / "output/save").iterdir()]
    assert len(saved) == 1 and saved[0].startswith("CKPT+epoch-0000-batch-")
    done = torchrun(RECIPE, tmp_path, yaml, "--ckpt_interval_steps", "0", "--test_batch_size", "1")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]


def test_two_steps_of_early_exit_train_together(tmp_path: Path) -> None:
    """Heads and encoder that a step does not train have no gradients, in all processes."""
    path = make_yaml(tmp_path)
    text = (
        path.read_text().replace("layers: 1\n", "layers: 3\n").replace("recipe: finetune_ctc\n", "recipe: early_exit\n")
    )
    first, rest = text.split("base: ", 1)
    base, rest = rest.split("\n", 1)
    path.write_text(f"{first}base:\n    - {base}\n    - !include:{ROOT_TAG}/hparams/_base/early_exit.yaml\n{rest}")
    options = [
        "--exit_layers",
        "[1, 2, 3]",
        "--exit_training",
        "two_step",
        "--first_step_epochs",
        "1",
        "--exit_rule",
        "entropy",
    ]
    options += ["--number_of_epochs", "2", "--calibrate_mean_layer", "2"]
    done = torchrun(["recipes/early_exit/train.py"], tmp_path, path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("calibrated on the validation split: entropy") == 1
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert (
        result["technique"] == "early_exit" and sum(result["details"]["exit_layers"].values()) == result["utterances"]
    )


def test_processes_share_the_states_of_frozen_layers(yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "two_layers.yaml"
    path.write_text(yaml.read_text().replace("layers: 1\n", "layers: 2\n").replace("dropout: 0.3", "dropout: 0.0"))
    options = ["--freeze_layers", "1", "--layer_states_folder", str(tmp_path / "states"), "--train_only", "True"]
    options += ["--speeds_percent", "[90, 100]"]
    done = torchrun(RECIPE, tmp_path / "run", path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([*(tmp_path / "states").glob("??/*.safetensors")]) == 4 * 2  # u0 and u4 are the same audio; two speeds
