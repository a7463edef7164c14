"""What the training loop does when a step goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import speechbrain as sb
import torch
from safetensors.torch import load_file

from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.loop import seed_step
from efficient_asr.training.run import run

QUICK = ["--device", "cpu", "--measure_runtime", "False", "--measure_macs", "False", "--batch_size", "1"]


def brain_with(bad: set[str], what: str = "loss", log: list[str] | None = None) -> type[CTCBrain]:
    """A brain whose loss or gradient is not finite for some utterances; `log` gets the utterances of every step taken."""

    class Spoiled(CTCBrain):
        def compute_objectives(self, predictions: tuple, batch: Any, stage: Any) -> torch.Tensor:
            loss = super().compute_objectives(predictions, batch, stage)
            if stage.name == "TRAIN" and bad & set(batch.id):
                if what == "loss":
                    return loss * torch.nan
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

        def optimizers_step(self) -> None:
            if log is not None:
                log.append(",".join(self.group_ids))
            super().optimizers_step()

    return Spoiled


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_named(
    what: str, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps: list[str] = []
    arguments = [str(tiny_yaml), *QUICK, "--number_of_epochs", "2"]
    assert run(brain_with({"u2"}, what, steps), arguments) == 0
    assert sorted(steps) == sorted(["u0", "u1", "u3"] * 2)
    error = capsys.readouterr().err
    assert f"step skipped: the {what} is not finite in epoch 1" in error and "u2" in error
    lines = [json.loads(line) for line in (tmp_path / "output/nonfinite.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["what"], line["ids"]) for line in lines] == [(1, what, ["u2"]), (2, what, ["u2"])]
    weights = load_file(tmp_path / "output/model/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_patience_ends(tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(tiny_yaml), *QUICK, "--nonfinite_patience", "2"]
    assert run(brain_with({"u0", "u1", "u2"}), arguments) == 2
    error = capsys.readouterr().err
    assert "3 non-finite steps exceed nonfinite_patience=2" in error and "lower the learning rates" in error
    assert run(brain_with({"u0", "u1"}), [*arguments, "--output_folder", str(tmp_path / "b")]) == 0


def test_one_bad_batch_spoils_its_whole_step_and_no_other(tiny_yaml: Path) -> None:
    steps: list[str] = []
    arguments = [str(tiny_yaml), *QUICK, "--number_of_epochs", "1", "--sorting", "ascending"]
    assert run(brain_with({"u2"}, "loss", steps), [*arguments, "--grad_accumulation_factor", "2"]) == 0
    assert steps == ["u3,u1"]  # by length: u2, u0 | u3, u1


def test_skipping_does_not_change_what_the_other_steps_draw(tiny_yaml: Path, tmp_path: Path) -> None:
    """The random numbers of a step follow from its place, not from what came before."""
    tiny_yaml.write_text(tiny_yaml.read_text().replace("dropout: 0.0", "dropout: 0.5"))
    drawn: dict[str, list[float]] = {"a": [], "b": []}
    for name, bad in (("a", set()), ("b", {"u0"})):

        class Recorder(brain_with(bad)):
            def compute_objectives(self, predictions: tuple, batch: Any, stage: Any, name: str = name) -> torch.Tensor:
                if stage.name == "TRAIN":
                    drawn[name].append(float(torch.rand(())))
                return super().compute_objectives(predictions, batch, stage)

        folder = ["--output_folder", str(tmp_path / name)]
        assert run(Recorder, [str(tiny_yaml), *QUICK, *folder, "--number_of_epochs", "2"]) == 0
    assert drawn["a"] == drawn["b"] and len(set(drawn["a"])) == 8


def test_seeds_differ_with_every_part_of_the_position() -> None:
    draws = set()
    for position in [(1, 1, 1, 0), (1, 1, 2, 0), (1, 2, 1, 0), (2, 1, 1, 0), (1, 1, 1, 1)]:
        seed_step(*position)
        draws.add(float(torch.rand(())))
    assert len(draws) == 5


class Vandal(CTCBrain):
    """Destroys an audio file when the training begins, after everything was checked."""

    path: Path

    def on_fit_start(self) -> None:
        self.path.write_bytes(b"gone")
        super().on_fit_start()


def test_audio_that_goes_bad_after_the_check(
    tiny_yaml: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = (corpus / "train.jsonl").read_text().splitlines()
    (corpus / "dev.jsonl").write_text(rows[0])
    (corpus / "test.jsonl").write_text(rows[0])
    Vandal.path = corpus / "u1.wav"
    content = Vandal.path.read_bytes()
    arguments = [str(tiny_yaml), *QUICK]
    assert run(Vandal, arguments) == 2
    error = capsys.readouterr().err
    assert "utterance 'u1': cannot decode" in error and "--skip_bad True" in error
    Vandal.path.write_bytes(content)
    for workers in ("0", "2"):
        Vandal.path.write_bytes(content)
        more = ["--skip_bad", "True", "--num_workers", workers, "--output_folder", str(tmp_path / workers)]
        assert run(Vandal, [*arguments, *more]) == 0
        assert capsys.readouterr().err.count("left out: utterance 'u1': cannot decode") == 2  # once an epoch


def test_throughput_is_noted(tiny_yaml: Path, tmp_path: Path) -> None:
    assert run(CTCBrain, [str(tiny_yaml), *QUICK, "--number_of_epochs", "2", "--batch_size", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "output/throughput.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line["audio_s"] == pytest.approx(1.0 + 1.31 + 0.7 + 1.137, abs=0.1)
        assert line["audio_s_per_s"] == pytest.approx(line["audio_s"] / line["wall_s"], rel=0.1)
        assert 0 <= line["waiting_percent"] <= 100 and 0 <= line["padding_percent"] < 50


def test_validation_counts_what_one_batch_would(tiny_yaml: Path, tmp_path: Path) -> None:
    """Loss and errors of the validation do not depend on how it was cut into batches."""
    logs = []
    for size in ("1", "3", "8"):
        folder = ["--output_folder", str(tmp_path / size), "--test_batch_size", size]
        assert run(CTCBrain, [str(tiny_yaml), *QUICK, *folder, "--number_of_epochs", "1"]) == 0
        logs.append((tmp_path / size / "train_log.txt").read_text())
    assert len(set(logs)) == 1


class VandalOfValidation(Vandal):
    """Destroys it when validation begins."""

    def on_fit_start(self) -> None:
        CTCBrain.on_fit_start(self)

    def on_stage_start(self, stage: Any, epoch: int | None = None) -> None:
        if stage.name == "VALID":
            self.path.write_bytes(b"gone")
        super().on_stage_start(stage, epoch)


def test_validation_over_fewer_utterances_does_not_count(
    tiny_yaml: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    VandalOfValidation.path = corpus / "u1.wav"
    assert run(VandalOfValidation, [str(tiny_yaml), *QUICK, "--skip_bad", "True"]) == 2
    error = capsys.readouterr().err
    assert "only 3 of 4 validation utterances" in error and "'u1'" in error
    assert not (tmp_path / "output/model").exists()
    left_out = [json.loads(line) for line in (tmp_path / "output/skipped_unreadable.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in left_out] == ["u1"]


def test_an_epoch_without_a_step_ends_the_run(
    tiny_yaml: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = (corpus / "train.jsonl").read_text().splitlines()
    (corpus / "train.jsonl").write_text(rows[1])
    Vandal.path = corpus / "u1.wav"
    assert run(Vandal, [str(tiny_yaml), *QUICK, "--skip_bad", "True"]) == 2
    assert "no optimiser step was taken in epoch 1" in capsys.readouterr().err


def test_a_changed_run_option_of_the_command_line_is_noticed(tiny_yaml: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(CTCBrain, [str(tiny_yaml), *QUICK, "--number_of_epochs", "1"]) == 0
    assert run(CTCBrain, [str(tiny_yaml), *QUICK, "--number_of_epochs", "2", "--max_grad_norm", "0.5"]) == 2
    assert "max_grad_norm: 5.0 before, 0.5 now" in capsys.readouterr().err


def test_a_signal_after_the_last_step_is_not_forgotten(tiny_yaml: Path, capsys: pytest.CaptureFixture) -> None:
    class Late(CTCBrain):
        def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            self.stop_request.requested = stage != sb.Stage.TRAIN

    arguments = [str(tiny_yaml), *QUICK, "--number_of_epochs", "1"]
    assert run(Late, arguments) == 130
    assert "rerun the command to resume" in capsys.readouterr().err
    assert run(CTCBrain, arguments) == 0


def test_a_step_that_the_gradient_scaler_skips_is_no_step(tiny_yaml: Path) -> None:
    """With fp16, gradients that overflow are no fault: the scaler skips the step and reduces its scale."""
    taken: list[int] = []

    class Scaled(brain_with({"u2"}, "gradient")):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: int | None = None) -> None:
            if stage == sb.Stage.TRAIN:
                taken.append(self.steps_taken)
            super().on_stage_end(stage, stage_loss, epoch)

    assert run(Scaled, [str(tiny_yaml), *QUICK, "--number_of_epochs", "1", "--train_only", "True"]) == 0
    assert taken == [3]


def test_a_limit_of_steps_ends_the_training_for_good(tiny_yaml: Path, tmp_path: Path) -> None:
    arguments = [
        str(tiny_yaml),
        *QUICK,
        "--number_of_epochs",
        "3",
        "--optimizer_step_limit",
        "6",
    ]  # four steps an epoch
    assert run(CTCBrain, arguments) == 0
    log, weights = tmp_path / "output/train_log.txt", tmp_path / "output/model/model.safetensors"
    before = log.read_text(), load_file(weights)
    assert len(before[0].splitlines()) == 2
    weights.unlink()  # as if the run had been killed before it saved the model
    assert run(CTCBrain, arguments) == 0
    assert log.read_text() == before[0]
    after = load_file(weights)
    assert all(torch.equal(after[name], value) for name, value in before[1].items())


@pytest.mark.parametrize(("factor", "per_epoch"), [(8, [4]), (3, [3, 1]), (2, [2, 2]), (1, [1] * 4)])
def test_the_last_batches_of_an_epoch_take_a_step_too(
    factor: int, per_epoch: list[int], tiny_yaml: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    arguments = [str(tiny_yaml), *QUICK, "--number_of_epochs", "2", "--grad_accumulation_factor", str(factor)]
    assert run(brain_with(set(), "loss", steps), arguments) == 0
    assert [len(step.split(",")) for step in steps] == per_epoch * 2


def test_a_last_step_is_scaled_by_its_own_number_of_batches(tiny_yaml: Path, tmp_path: Path) -> None:
    """Four batches with a factor of 8 are one step, and so are they with a factor of 4: the weights must be the same."""
    weights = []
    for factor in ("4", "8"):
        folders = ["--output_folder", str(tmp_path / factor), "--results_folder", str(tmp_path / factor)]
        options = ["--number_of_epochs", "2", "--train_only", "True", "--grad_accumulation_factor", factor]
        assert run(CTCBrain, [str(tiny_yaml), *QUICK, *folders, *options]) == 0
        weights.append(load_file(tmp_path / factor / "model" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_debug_goes_through_everything_and_touches_no_result(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tiny_yaml), *QUICK, "--test_batch_size", "1", "--debug"]
    assert run(CTCBrain, arguments) == 0
    assert not (tmp_path / "results").exists() and not (tmp_path / "output" / "model").exists()
    result = json.loads((tmp_path / "output-debug" / "results" / "tiny.json").read_text())
    assert result["utterances"] == 2 and "the results are meaningless" in capsys.readouterr().out
    assert run(CTCBrain, [str(tiny_yaml), *QUICK, "--number_of_epochs", "1"]) == 0  # begins anew
    assert "resuming from" not in capsys.readouterr().out


def test_the_end_says_what_is_kept_and_only_what_was_measured(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tiny_yaml), *QUICK, "--number_of_epochs", "1"]
    assert run(CTCBrain, arguments) == 0
    said = capsys.readouterr().out
    assert "--keep_checkpoints False removes them" in said and (tmp_path / "output" / "save").is_dir()
    assert " - " not in said and "with LM" not in said and "GMACs" not in said and "CPU" not in said
    arguments += ["--keep_checkpoints", "False"]
    assert run(CTCBrain, arguments) == 0
    assert "checkpoints removed" in capsys.readouterr().out and not (tmp_path / "output" / "save").exists()
    log = (tmp_path / "output" / "train_log.txt").read_bytes()
    assert run(CTCBrain, arguments) == 0  # as any rerun: nothing is trained again
    assert "its checkpoints were removed" in capsys.readouterr().out
    assert (tmp_path / "output" / "train_log.txt").read_bytes() == log and not (tmp_path / "output" / "save").is_dir()
    assert run(CTCBrain, [*arguments, "--lr_head", "0.5"]) == 2
    assert "lr_head: changed since the training" in capsys.readouterr().err
    # it cannot go on, and its result must not say that it did
    assert run(CTCBrain, [*arguments, "--number_of_epochs", "2"]) == 2
    assert "number_of_epochs: changed since the training" in capsys.readouterr().err


class Worse(CTCBrain):
    """A brain that is best after its first epoch."""

    def checkpoint_metric(self, stats: dict[str, float]) -> float:
        return float(self.hparams.epoch_counter.current)


def weights_after(yaml: Path, folder: Path, brain: type[CTCBrain], *options: str) -> dict[str, torch.Tensor]:
    places = ["--output_folder", str(folder), "--results_folder", str(folder / "results"), "--train_only", "True"]
    assert run(brain, [str(yaml), *QUICK, *places, *options]) == 0
    return load_file(folder / "model" / "model.safetensors")


def test_the_best_epoch_is_saved_and_not_the_last(tiny_yaml: Path, tmp_path: Path) -> None:
    one = weights_after(tiny_yaml, tmp_path / "one", CTCBrain, "--number_of_epochs", "1")
    best = weights_after(tiny_yaml, tmp_path / "best", Worse, "--number_of_epochs", "3")
    last = weights_after(tiny_yaml, tmp_path / "last", CTCBrain, "--number_of_epochs", "3")
    assert all(torch.equal(one[name], best[name]) for name in one)
    assert any(not torch.equal(one[name], last[name]) for name in one)


def test_a_lower_learning_rate_is_that_of_the_optimiser(tiny_yaml: Path, tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}

    class Watched(CTCBrain):
        def optimizers_step(self) -> None:
            for name, optimizer in self.optimizers_dict.items():
                seen.setdefault(name, []).append(optimizer.param_groups[0]["lr"])
            super().optimizers_step()

    factors = ["--annealing_encoder", "0.5", "--annealing_head", "0.25", "--newbob_threshold", "100"]  # never enough
    weights_after(tiny_yaml, tmp_path / "a", Watched, "--number_of_epochs", "3", *factors)
    for name, factor in (("encoder", 0.5), ("head", 0.25)):
        first, last = seen[name][0], seen[name][-1]
        assert last == pytest.approx(factor * first)
