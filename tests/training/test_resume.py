"""kill -9 at many points of a training, start the same command again, and compare with the run that was left alone."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, make_yaml, train
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: object, name: str, number: int, after: bool = False) -> None:
    """Kill this process when a function is called for the `number`-th time, before or after its work."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == number and not after:
            die()
        value = original(*args, **kwargs)
        if calls[0] == number:
            die()
        return value

    setattr(owner, name, wrapped)


def kill_points() -> dict[str, Callable[[], None]]:
    import speechbrain as sb
    import torch

    from efficient_asr.evaluation import evaluator
    from efficient_asr.evaluation.result import Result
    from efficient_asr.models.ctc import CTCModel
    from efficient_asr.training import checkpoints
    from efficient_asr.training import run as experiment
    from efficient_asr.training.ctc import CTCBrain

    return {
        "before the first batch": lambda: at_call(CTCBrain, "fit_batch", 1),
        "in the middle of the first epoch": lambda: at_call(CTCBrain, "fit_batch", 3),
        "in the middle of the second epoch, after its forward pass": lambda: at_call(
            CTCBrain, "compute_objectives", 8, True
        ),
        "between backward pass and step": lambda: at_call(CTCBrain, "optimizers_step", 6),
        "after a step that was not saved": lambda: at_call(CTCBrain, "optimizers_step", 7, True),
        "in a save, before anything is written": lambda: at_call(checkpoints, "save_file", 3),
        "in a save, after the weights": lambda: at_call(checkpoints, "save_file", 7, True),
        "in a save, after the state": lambda: at_call(torch, "save", 2, True),
        "in a save, before the rename": lambda: at_call(os, "rename", 4),
        "between save and clean-up": lambda: at_call(checkpoints.Checkpointer, "clean_up", 6),
        "in the clean-up": lambda: at_call(checkpoints.shutil, "rmtree", 4),
        "in validation": lambda: at_call(CTCBrain, "evaluate_batch", 1),
        "between log and save": lambda: at_call(sb.utils.train_logger.FileTrainLogger, "log_stats", 2, True),
        "after the last epoch": lambda: at_call(checkpoints.Checkpointer, "best", 1),
        "while the model folder is written": lambda: at_call(CTCModel, "save", 1),
        "in the evaluation": lambda: at_call(evaluator, "score_utterance", 3),
        "before the result is written": lambda: at_call(Result, "save", 1),
        "after everything": lambda: at_call(experiment, "measure", 1, True),
    }


def end_state(folder: Path) -> dict:
    """All that must be the same at the end of two runs."""
    from efficient_asr.utils.safe_load import load_state

    result = json.loads((folder / "results" / "tiny.json").read_text())
    checkpoints = sorted((folder / "output" / "save").iterdir())
    return {
        "model": load_file(folder / "output" / "model" / "model.safetensors"),
        "checkpoints": [path.name for path in checkpoints],
        "weights": [load_file(path / "model.safetensors") for path in checkpoints],
        "states": [load_state(path / "state.pt") for path in checkpoints],
        "log": (folder / "output" / "train_log.txt").read_text(),
        "utterances": (folder / "results" / "tiny.utterances.jsonl").read_text(),
        "wer": result["wer_percent"],
        "left over": sorted(p.name for p in (folder / "output" / "scores").iterdir()),
    }


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "throughput.jsonl":  # holds times
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_yaml(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, console = train(yaml, folder)
    assert code == 0 and "resuming" not in console, console
    return end_state(folder)


POINTS = list(kill_points())


def kill_at(point: str) -> None:
    kill_points()[point]()


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_ends_where_the_uninterrupted_run_ends(
    point: str, yaml: Path, uninterrupted: dict, tmp_path: Path
) -> None:
    code, console = train(yaml, tmp_path, functools.partial(kill_at, point))
    assert code == -signal.SIGKILL, console
    code, console = train(yaml, tmp_path)
    assert code == 0, console
    assert ("resuming from" in console) == (point != POINTS[0])  # nothing was saved yet
    assert ("2 utterances are already scored" in console) == (point == "in the evaluation")
    assert_same(uninterrupted, end_state(tmp_path))


def test_killed_many_times(yaml: Path, uninterrupted: dict, tmp_path: Path) -> None:
    for point in [*POINTS[1:11], *POINTS[1:5]]:
        train(yaml, tmp_path, functools.partial(kill_at, point))
    code, console = train(yaml, tmp_path)
    assert code == 0, console
    assert_same(uninterrupted, end_state(tmp_path))


def test_without_checkpoints_in_the_epoch_it_starts_the_epoch_again(
    yaml: Path, uninterrupted: dict, tmp_path: Path
) -> None:
    options = [*OPTIONS, "--ckpt_interval_steps", "0"]
    point = functools.partial(kill_at, "in the middle of the second epoch, after its forward pass")
    assert train(yaml, tmp_path, point, options)[0] == -signal.SIGKILL
    code, console = train(yaml, tmp_path, None, options)
    assert code == 0 and "1 epochs and 0 batches are done" in console
    assert_same(uninterrupted["model"], end_state(tmp_path)["model"])


def test_data_loading_processes_change_nothing(yaml: Path, uninterrupted: dict, tmp_path: Path) -> None:
    options = [*OPTIONS, "--num_workers", "2"]
    point = functools.partial(kill_at, "in the middle of the second epoch, after its forward pass")
    assert train(yaml, tmp_path, point, options)[0] == -signal.SIGKILL
    code, console = train(yaml, tmp_path, None, options)
    assert code == 0, console
    assert_same(uninterrupted["model"], end_state(tmp_path)["model"])


def test_the_comparison_can_fail(yaml: Path, uninterrupted: dict, tmp_path: Path) -> None:
    """Another seed must end elsewhere, or the tests above would prove nothing."""
    assert train(yaml, tmp_path, None, [*OPTIONS, "--seed", "7"])[0] == 0
    with pytest.raises(AssertionError):
        assert_same(uninterrupted["model"], end_state(tmp_path)["model"])


@pytest.mark.parametrize(("moment", "number"), [*((moment, signal.SIGTERM) for moment in (0, 9)), (6, signal.SIGINT)])
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on(
    moment: int, number: int, yaml: Path, uninterrupted: dict, tmp_path: Path
) -> None:
    """Schedulers and terminals signal loading processes as well; none of them may take the checkpoint along."""
    options = [*OPTIONS, "--num_workers", "2", "--ckpt_interval_steps", "0"]
    code, console = train(yaml, tmp_path, functools.partial(signal_group_at, moment, number), options)
    assert code == 130 and "saved in" in console and "killed by signal" not in console, console
    assert list((tmp_path / "output" / "save").glob("CKPT+*")), console
    code, console = train(yaml, tmp_path, None, options)
    assert code == 0 and "resuming from" in console, console
    assert_same(uninterrupted["model"], end_state(tmp_path)["model"])


def signal_group_at(moment: int, number: int) -> None:
    """Make this process the leader of its group, and signal all of it before the `moment`-th batch."""
    from efficient_asr.training.ctc import CTCBrain

    os.setpgrp()
    original, calls = CTCBrain.fit_batch, [0]

    def fit_batch(self: CTCBrain, batch: object) -> torch.Tensor:
        if calls[0] == moment:
            os.killpg(0, number)
        calls[0] += 1
        return original(self, batch)

    CTCBrain.fit_batch = fit_batch
