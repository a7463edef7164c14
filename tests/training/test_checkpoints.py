"""Checkpoints: whole or refused, never executed; and all the ways in which a run may be stopped short of a kill."""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, begin, make_yaml, train
from safetensors.torch import load_file, save_file

from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.training import checkpoints
from efficient_asr.training.checkpoints import Checkpoint, Checkpointer, StateAdapter, check_settings
from efficient_asr.utils.errors import UserError, exit_code
from efficient_asr.utils.locks import FolderLock
from efficient_asr.utils.safe_load import load_state


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.target),))


def make(folder: Path, value: float = 0.0) -> Checkpointer:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    checkpointer = Checkpointer(folder, model, {"lr": "0.1"})
    checkpointer.add_recoverable("optimiser", torch.optim.Adam(model.parameters()))
    return checkpointer


def save(checkpointer: Checkpointer, value: float, epoch: int, wer: float | None = None, step: int = 0) -> None:
    torch.nn.init.constant_(checkpointer.model.weight, value)
    name = f"epoch-{epoch:04d}" + (f"-batch-{step}" if step else "")
    checkpointer.save(name, {"position": [epoch, step]} | ({} if wer is None else {"WER": wer}))


def names(checkpointer: Checkpointer) -> list[str]:
    return [checkpoint.path.name for checkpoint in checkpointer.list()]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    for epoch, wer in enumerate([50.0, 20.0, 30.0, 25.0], start=1):
        save(checkpointer, float(epoch), epoch, wer)
        save(checkpointer, epoch + 0.5, epoch, step=3)
    assert names(checkpointer) == ["CKPT+epoch-0004-batch-3", "CKPT+epoch-0002"]
    checkpointer.load_model(checkpointer.best())
    assert checkpointer.model.weight[0, 0] == 2.0
    checkpointer.recover(checkpointer.newest())
    assert checkpointer.model.weight[0, 0] == 4.5


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["shorter", "missing", "flipped"])
def test_a_torn_checkpoint_is_passed_over(
    file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpointer = make(tmp_path)
    save(checkpointer, 1.0, 1, 10.0)
    save(checkpointer, 2.0, 2, 20.0)
    path = tmp_path / "CKPT+epoch-0002" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1 if file != "meta.json" else 128
        path.write_bytes(content[:-5] if damage == "shorter" else content)
    assert checkpointer.newest().path.name == "CKPT+epoch-0001"
    if file != "meta.json":
        assert "CKPT+epoch-0002 is damaged" in capsys.readouterr().out
    save(checkpointer, 3.0, 2, 5.0)  # the same place again replaces it
    assert checkpointer.newest().path.name == "CKPT+epoch-0002"


def test_attributes_of_an_object_are_recovered() -> None:
    class Owner:
        value, other = 1, 2

    owner = Owner()
    state = StateAdapter(owner, "value").state_dict()
    owner.value, owner.other = 7, 8
    StateAdapter(owner, "value").load_state_dict(state)
    assert (owner.value, owner.other) == (1, 8)


# ------------------------------------------------------------ nothing is executed


def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    checkpointer = make(tmp_path / "save")
    save(checkpointer, 1.0, 1, 10.0)
    path, target = tmp_path / "save" / "CKPT+epoch-0001", tmp_path / "executed"
    torch.save({"optimiser": Malice(target)}, path / "state.pt")
    meta = json.loads((path / "meta.json").read_text())
    from efficient_asr.training.checkpoints import _describe

    meta["files"]["state.pt"] = _describe(path / "state.pt")  # an attacker would mend the sums
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="could execute code and was not read"):
        checkpointer.recover(checkpointer.newest())
    assert not target.exists()
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Malice(target)))
    with pytest.raises(UserError, match="could execute code and was not read"):
        load_state(bare)
    assert not target.exists()
    torch.load(path / "state.pt", weights_only=False)  # the attempt is a real one
    assert target.exists()


def test_yaml_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    checkpointer, target = make(tmp_path / "save"), tmp_path / "executed"
    folder = tmp_path / "save" / "CKPT+2026-01-01"
    folder.mkdir(parents=True)
    text = f"!!python/object/apply:os.mkdir ['{target}']\n"
    (folder / "CKPT.yaml").write_text(text)
    with pytest.raises(UserError, match="SpeechBrain's format, which can execute code"):
        checkpointer.newest()
    assert not target.exists()
    import yaml

    yaml.load(text, Loader=yaml.Loader)  # the attempt is a real one
    assert target.exists()


def test_a_pickle_in_a_model_folder_is_refused_and_not_executed(tmp_path: Path, tiny_ctc: CTCModel) -> None:
    folder, target = tmp_path / "model", tmp_path / "executed"
    tiny_ctc.save(folder)
    (folder / "hyperparams.yaml").write_text(f"x: !apply:os.mkdir ['{target}']\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(target)))
    CTCModel.load(folder)  # what does not belong there is not looked at
    assert not target.exists()
    (folder / "model.safetensors").rename(folder / "other")
    with pytest.raises(UserError, match=r"no model.safetensors.*pytorch_model.bin.*can execute code"):
        CTCModel.load(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        CTCModel.load(folder)
    assert not target.exists()


def test_a_pickle_in_a_hugging_face_folder_is_refused_and_not_executed(
    tmp_path: Path, ssl_sources: dict[str, str]
) -> None:
    folder, target = tmp_path / "wavlm", tmp_path / "executed"
    folder.mkdir()
    for path in Path(ssl_sources["wavlm-base"]).glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"masked_spec_embed": Malice(target)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"(?s)cannot be loaded.*code"):
        load_encoder(str(folder))
    assert not target.exists()


# ------------------------------------------------------------ settings


def test_changed_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpointer = make(tmp_path)
    save(checkpointer, 1.0, 1, 10.0)
    newest = checkpointer.newest()
    check_settings(newest, {"lr": "0.1"}, allow_changed_settings=False)
    with pytest.raises(
        UserError, match=r"(?s)lr: 0.1 before, 0.2 now.*new: \(not set\) before, 1 now.*--allow_changed_settings True"
    ):
        check_settings(newest, {"lr": "0.2", "new": "1"}, allow_changed_settings=False)
    check_settings(newest, {"lr": "0.2"}, allow_changed_settings=True)
    assert "lr: 0.1 before, 0.2 now" in capsys.readouterr().out


def test_two_locks_in_one_process_and_release(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    FolderLock(tmp_path).release()


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_yaml(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.slow
def test_a_changed_yaml_stops_unless_told_to_go_on(yaml: Path, tmp_path: Path) -> None:
    short = [*OPTIONS, "--number_of_epochs", "1"]
    assert train(yaml, tmp_path, None, short)[0] == 0
    code, console = train(yaml, tmp_path, None, [*OPTIONS, "--lr_head", "0.001", "--head_block", "feedforward"])
    assert (
        code == 2
        and "lr_head: 0.005 before, 0.001 now" in console
        and "head_block: none before, feedforward now" in console
    )
    code, console = train(yaml, tmp_path, None, [*OPTIONS, "--lr_head", "0.001", "--allow_changed_settings", "True"])
    assert code == 0 and "resuming from" in console
    code, console = train(yaml, tmp_path, None, [*OPTIONS, "--lr_head", "0.001", "--test_only", "True"])
    assert code == 0  # measuring depends on none of it


@pytest.mark.slow
def test_changed_training_data_stop_unless_told_to_go_on(tmp_path: Path) -> None:
    yaml = make_yaml(tmp_path)
    assert train(yaml, tmp_path / "run", None, [*OPTIONS, "--number_of_epochs", "1"])[0] == 0
    manifest = tmp_path / "corpus" / "train.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:3]))
    code, console = train(yaml, tmp_path / "run")
    assert code == 2 and "training utterances: 4, sum" in console and "3, sum" in console


# ------------------------------------------------------------ stopped


def nap(*_: object) -> None:
    time.sleep(0.2)


def slow_batches() -> None:
    """Give the test time to act while the training is at work."""
    from efficient_asr.training.ctc import CTCBrain

    CTCBrain.on_fit_batch_start = nap


def slow_validation() -> None:
    from efficient_asr.training.ctc import CTCBrain

    original = CTCBrain.evaluate_batch

    def evaluate_batch(self: CTCBrain, batch: object, stage: object) -> torch.Tensor:
        time.sleep(0.3)
        return original(self, batch, stage)

    CTCBrain.evaluate_batch = evaluate_batch


def wait_for(condition: object, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["batch", "validation"])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(
    number: signal.Signals, where: str, yaml: Path, tmp_path: Path
) -> None:
    never = [*OPTIONS, "--ckpt_interval_steps", "0", "--test_batch_size", "1"]
    process = begin(yaml, tmp_path, slow_batches if where == "batch" else slow_validation, never)
    # The progress bar on the console says where the training is.
    console = tmp_path / "console.txt"
    wait_for(lambda: console.is_file() and ("| 1/4" if where == "batch" else "| 4/4") in console.read_text())
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 130
    text = console.read_text()
    assert "Rerun the command to resume" in text and "Traceback" not in text
    code, text = train(yaml, tmp_path, None, never)
    assert code == 0 and "0 epochs and " + ("4 batches" if where == "validation" else "") in text
    code, _ = train(yaml, tmp_path / "alone", None, never)
    results = [(p / "results" / "tiny.utterances.jsonl").read_text() for p in (tmp_path, tmp_path / "alone")]
    weights = [(p / "output/model/model.safetensors").read_bytes() for p in (tmp_path, tmp_path / "alone")]
    assert results[0] == results[1] and weights[0] == weights[1]


@pytest.mark.slow
def test_two_runs_in_one_folder(yaml: Path, tmp_path: Path) -> None:
    process = begin(yaml, tmp_path, slow_batches)
    wait_for(lambda: (tmp_path / "output" / "save").is_dir())
    code, console = train(yaml, tmp_path)
    assert code == 2 and f"is in use by process {process.pid} on" in console
    process.join(120)
    assert process.exitcode == 0  # and the first was not disturbed


def limit_file_size() -> None:
    """Let the system refuse what a full disk would: writing more than some bytes into a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(yaml: Path, tmp_path: Path) -> None:
    code, console = train(yaml, tmp_path, limit_file_size)
    assert code == 2 and "no checkpoint could be written to" in console and "There is no earlier one" in console
    assert not list((tmp_path / "output" / "save").glob("*"))
    assert train(yaml, tmp_path, None, [*OPTIONS, "--number_of_epochs", "1"])[0] == 0
    code, console = train(yaml, tmp_path, limit_file_size)
    assert code == 2 and "The last good one, CKPT+epoch-0001, was kept" in console and "Traceback" not in console
    code, console = train(yaml, tmp_path)
    assert code == 0 and "1 epochs and 0 batches are done" in console


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES"])
def test_what_the_system_refuses_is_said_in_a_sentence(number: str, capsys: pytest.CaptureFixture) -> None:
    import errno

    code = getattr(errno, number)

    def full() -> None:
        raise OSError(code, os.strerror(code), "/data/x")

    assert exit_code(full) == 2
    assert f"error: {os.strerror(code)} (/data/x); fix this, then rerun" in capsys.readouterr().err


def test_other_system_errors_are_ours() -> None:
    with pytest.raises(FileNotFoundError):
        exit_code(functools.partial(open, "/no/such/file"))


def spoil(checkpointer: Checkpointer, name: str) -> None:
    path = checkpointer.checkpoints_dir / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def test_a_damaged_checkpoint_is_put_aside_and_deletes_no_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpointer = make(tmp_path)
    save(checkpointer, 1.0, 1, 20.0)
    save(checkpointer, 2.0, 2, 30.0)
    spoil(checkpointer, "CKPT+epoch-0002")
    assert checkpointer.newest().path.name == "CKPT+epoch-0001" and "renamed to DAMAGED-" in capsys.readouterr().out
    save(checkpointer, 1.5, 1, step=3)
    assert names(checkpointer) == ["CKPT+epoch-0001-batch-3", "CKPT+epoch-0001"]
    assert (tmp_path / "DAMAGED-CKPT+epoch-0002").is_dir()


def test_a_damaged_best_is_not_taken(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    save(checkpointer, 1.0, 1, 20.0)
    save(checkpointer, 2.0, 2, 30.0)
    spoil(checkpointer, "CKPT+epoch-0001")
    assert checkpointer.best().path.name == "CKPT+epoch-0002"


def test_a_model_folder_on_a_full_disk_is_a_users_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    from efficient_asr.models import parts as components

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(components, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written to .*No space left"):
        components.save_folder(tmp_path, {}, {})


class Tied(torch.nn.Module):
    """Two layers with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    checkpointer = Checkpointer(tmp_path, model, {})
    checkpointer.save("a", {"position": [1, 0]})
    (file,) = tmp_path.glob("*/model.safetensors")
    assert list(load_file(file)) == ["first.weight"]
    Checkpointer(tmp_path, other, {}).load_model(checkpointer.newest())
    assert torch.equal(other.first.weight, model.first.weight) and other.second.weight is other.first.weight
    # those of earlier versions, which hold both, are read as well
    save_file({f"{name}.weight": torch.ones(64, 64) for name in ("first", "second")}, file)
    other.load_state_dict({f"{name}.weight": torch.zeros(64, 64) for name in ("first", "second")})
    Checkpointer(tmp_path, other, {}).load_model(checkpointer.list()[0])
    assert torch.equal(other.second.weight, torch.ones(64, 64))


def test_a_worker_that_dies_does_not_take_the_checkpoint_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises in the main process, wherever it is, when a loading process has died."""
    checkpointer, calls = Checkpointer(tmp_path, Tied(), {}), []
    original = checkpoints.save_file

    def dying(*args: object) -> None:
        calls.append(args)
        if len(calls) < 3:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
        original(*args)

    monkeypatch.setattr(checkpoints, "save_file", dying)
    checkpointer.save("a", {"position": [1, 0]})
    assert checkpointer.newest() is not None and len(calls) == 3
    assert "a data loading process has died" in checkpoints.worker_died(RuntimeError("DataLoader worker x"))


def test_weights_of_an_earlier_version_have_their_names_of_today(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.training_modules = torch.nn.ModuleDict({"distillation": torch.nn.Linear(2, 1)})
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    checkpointer = Checkpointer(tmp_path, model, {})
    checkpointer.save("a", {"position": [1, 0], "WER": 1.0})
    (checkpoint,) = checkpointer.list()
    before = {key.removeprefix("training_modules."): value for key, value in wanted.items()}
    save_file(before, checkpoint.path / "model.safetensors")
    torch.nn.init.zeros_(model.training_modules["distillation"].weight)
    checkpointer.load_model(checkpoint)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_from_before_a_key_existed_goes_on_with_what_was_fixed_then(tmp_path: Path) -> None:
    then = {"go_on": "False", "encoder": "!apply:efficient_asr.models.load_encoder source: !ref <source>"}
    now = {
        "length_jitter": "0.05", "train_layerdrop": "null", "allow_changed_settings": "False",
        "encoder": "!apply:efficient_asr.models.encoders.load.load_encoder source: !ref <source> layerdrop: !ref "
        "<train_layerdrop>",
    }  # fmt: skip
    checkpoint = Checkpoint(tmp_path, {"settings": then})
    check_settings(checkpoint, now, allow_changed_settings=False)
    with pytest.raises(UserError, match=r"length_jitter: 0\.05 before, 0\.1 now"):
        check_settings(checkpoint, now | {"length_jitter": "0.1"}, allow_changed_settings=False)
