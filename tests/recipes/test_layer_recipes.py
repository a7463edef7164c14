"""The recipes for layer removal and early exit, from the command line to the Result, and the sweep over what they leave."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import speechbrain as sb
import torch
from conftest import ROOT, ROOT_TAG, make_corpus, make_wavs, write_tiny_yaml
from runs import run_script
from safetensors.torch import load_file

from efficient_asr.data import pad_wavs
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import score
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.models.ctc import CTCModel
from efficient_asr.techniques.early_exit.heads import NEVER
from efficient_asr.techniques.early_exit.sweep import Sweep, sweep
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError

QUICK = ["--device", "cpu", "--measure_runtime", "False"]


def brain_of(recipe: str) -> type[CTCBrain]:
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / recipe / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe] = module
    spec.loader.exec_module(module)
    return next(value for name, value in vars(module).items() if name.endswith("Brain") and name != "CTCBrain")


LayerRemovalBrain, EarlyExitBrain = brain_of("layer_removal"), brain_of("early_exit")


@pytest.fixture
def three_layers(tiny_yaml: Path) -> Path:
    tiny_yaml.write_text(tiny_yaml.read_text().replace("layers: 1\n", "layers: 3\n"))
    return tiny_yaml


def with_base(yaml: Path, base: str) -> Path:
    text = yaml.read_text().replace("base: ", "base:\n    - ", 1)
    path = yaml.with_name(f"{base}.yaml")
    own = f"    - !include:{ROOT_TAG}/hparams/_base/{base}.yaml\n"
    head, rest = text.split("experiment: tiny", 1)
    path.write_text(head + own + "experiment: tiny" + rest.replace("recipe: finetune_ctc", f"recipe: {base}"))
    return path


def result_of(folder: Path) -> dict:
    return json.loads((folder / "tiny.json").read_text())


def test_all_layers_train_as_the_baseline_does(three_layers: Path, tmp_path: Path) -> None:
    assert run(CTCBrain, [str(three_layers), *QUICK, "--output_folder", str(tmp_path / "a")]) == 0
    yaml = with_base(three_layers, "layer_removal")
    options = [*QUICK, "--output_folder", str(tmp_path / "b"), "--kept_layers", "all"]
    assert run(LayerRemovalBrain, [str(yaml), *options]) == 0
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in "ab"]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert result_of(tmp_path / "results")["technique"] == "none"


@pytest.mark.parametrize(
    ("kept", "layers"),
    [("first_2", [1, 2]), ("2", [1, 2]), ("last_1", [3]), ("least_redundant_2", None), ("[1, 3]", [1, 3])],
)
def test_removal_from_the_command_line(three_layers: Path, tmp_path: Path, kept: str, layers: list[int] | None) -> None:
    yaml = with_base(three_layers, "layer_removal")
    assert run(LayerRemovalBrain, [str(yaml), *QUICK, "--kept_layers", kept, "--number_of_epochs", "1"]) == 0
    result = result_of(tmp_path / "results")
    assert result["technique"] == "layer_removal" and result["details"]["of_layers"] == 3
    assert layers is None or result["details"]["kept_layers"] == layers
    loaded = CTCModel.load(tmp_path / "output/model")
    assert loaded.encoder.num_layers == len(result["details"]["kept_layers"]) == result["details"]["layers"]
    # cut again: numbers stay those of the uncut network
    again = ["--pretrained_model", str(tmp_path / "output/model"), "--output_folder", str(tmp_path / "again")]
    source = three_layers.read_text().replace("layers: 3\n", f"layers: {loaded.encoder.num_layers}\n")
    three_layers.write_text(source)
    yaml = with_base(three_layers, "layer_removal")
    assert (
        run(LayerRemovalBrain, [str(yaml), *QUICK, *again, "--kept_layers", "last_1", "--number_of_epochs", "1"]) == 0
    )
    assert result_of(tmp_path / "results")["details"]["kept_layers"] == result["details"]["kept_layers"][-1:]


def test_layer_drop_of_a_trained_model(three_layers: Path, tmp_path: Path) -> None:
    yaml = with_base(three_layers, "layer_removal")
    arguments = [str(yaml), *QUICK, "--kept_layers", "all"]
    assert run(LayerRemovalBrain, [*arguments, "--number_of_epochs", "1"]) == 0
    full = result_of(tmp_path / "results")
    assert run(LayerRemovalBrain, [*arguments, "--test_only", "True", "--test_layerdrop", "0.9"]) == 0
    result = result_of(tmp_path / "results")
    assert result["technique"] == "layer_drop" and result["details"]["test_layerdrop"] == 0.9
    assert result["macs_g"] < full["macs_g"] and result["parameters"] == full["parameters"]
    assert run(LayerRemovalBrain, [*arguments, "--test_only", "True", "--test_layerdrop", "1.5"]) == 2


@pytest.fixture
def exits(three_layers: Path) -> list[str]:
    return with_exits(three_layers)


def with_exits(yaml: Path) -> list[str]:
    yaml = with_base(yaml, "early_exit")
    return [str(yaml), *QUICK, "--exit_layers", "[1, 2, 3]", "--number_of_epochs", "4"]


def test_early_exit_from_the_command_line(exits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(EarlyExitBrain, [*exits, "--exit_rule", "entropy", "--calibrate_mean_layer", "2"]) == 0
    result = result_of(tmp_path / "results")
    details = result["details"]
    assert result["variant"] == f"entropy {details['exit_threshold']:.6g}"
    assert result["technique"] == "early_exit" and details["exit_threshold"] > 0
    assert sum(details["exit_layers"].values()) == 4
    assert set(details["wer_percent_of_heads"]) == {"1", "2", "3"}
    log = (tmp_path / "output/train_log.txt").read_text().splitlines()
    assert all(f"wer_percent_layer_{layer}" in log[-1] for layer in (1, 2, 3))
    lines = (tmp_path / "results/tiny.utterances.jsonl").read_text().splitlines()
    assert np.mean([json.loads(line)["exit_layer"] for line in lines]) == details["mean_exit_layer"]
    card = (tmp_path / "output/model/README.md").read_text()
    assert result["variant"] in card
    # another rule, without training anything again; the calibrated threshold belongs to the first one
    assert (
        run(EarlyExitBrain, [*exits, "--test_only", "True", "--exit_rule", "similarity", "--exit_threshold", "-2"]) == 0
    )
    assert (tmp_path / "output/model/README.md").read_text() == card  # the model still has the first rule
    other = result_of(tmp_path / "results")
    assert other["details"]["mean_exit_layer"] == 1 and other["variant"] == "similarity -2"
    assert details["mean_exit_layer"] > 1 and other["macs_g"] < result["macs_g"]
    assert run(EarlyExitBrain, [*exits, "--test_only", "True", "--exit_rule", "confidence"]) == 2
    assert "the model has one for entropy" in capsys.readouterr().err
    assert (
        run(EarlyExitBrain, [*exits, "--test_only", "True", "--calibrate_mean_layer", "1.5"]) == 2
    )  # only training calibrates
    assert "1.5 now" in capsys.readouterr().err
    assert run(EarlyExitBrain, [*exits, "--test_only", "True", "--exit_rule", "entropy"]) == 0
    assert result_of(tmp_path / "results")["details"] == details


def test_two_steps_train_the_model_first_and_the_heads_then(exits: list[str], tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    class Watch(EarlyExitBrain):
        def on_stage_start(self, stage: object, epoch: int | None = None) -> None:
            if stage.name == "TRAIN":
                states.append({name: value.clone() for name, value in self.model.state_dict().items()})
            super().on_stage_start(stage, epoch)

    assert run(Watch, [*exits, "--exit_training", "two_step", "--first_step_epochs", "2"]) == 0
    start, first, second, last = states
    same = {name for name, value in start.items() if torch.equal(value, second[name])}
    assert {name for name in same if "head" in name} == {
        f"head.heads.{i}.linear.{key}" for i in (0, 1) for key in ("weight", "bias")
    }
    assert any("encoder" in name for name, value in first.items() if not torch.equal(value, second[name]))
    changed = {name for name, value in second.items() if not torch.equal(value, last[name])}
    assert changed == {f"head.heads.{i}.linear.{key}" for i in (0, 1) for key in ("weight", "bias")}


def test_two_steps_with_a_schedule_that_knows_no_loss(three_layers: Path) -> None:
    schedule = "!new:efficient_asr.training.schedules.LinearSchedule {lr: 0.005}\n"
    yaml = with_base(three_layers, "early_exit")
    yaml.write_text(yaml.read_text() + f"encoder_scheduler: {schedule}head_scheduler: {schedule}")
    options = [
        "--exit_layers",
        "[1, 2, 3]",
        "--number_of_epochs",
        "2",
        "--first_step_epochs",
        "1",
        "--train_only",
        "True",
    ]
    assert run(EarlyExitBrain, [str(yaml), *QUICK, *options, "--exit_training", "two_step"]) == 0


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_two_steps_resume_on_both_sides_of_the_switch(exits: list[str], tmp_path: Path, epoch: int) -> None:
    class Stopped(EarlyExitBrain):
        def fit_batch(self, batch: object) -> torch.Tensor:
            if self.hparams.epoch_counter.current == epoch and self.step == 2:
                raise KeyboardInterrupt
            return super().fit_batch(batch)

    weights = []
    options = ["--exit_training", "two_step", "--first_step_epochs", "2", "--ckpt_interval_steps", "1"]
    options += ["--ckpt_interval_minutes", "0"]
    for name, brains in (("a", [EarlyExitBrain]), ("b", [Stopped, EarlyExitBrain])):
        codes = [run(brain, [*exits, *options, "--output_folder", str(tmp_path / name)]) for brain in brains]
        assert codes == [130, 0][-len(brains) :]
        weights.append(load_file(tmp_path / name / "model/model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit_rule", "entropi"], "Did you mean 'entropy'"),
        (["--exit_layers", "[1, 2]"], "must be the encoder's last layer, 3"),
        (["--exit_layers", "6"], "expected a list of numbers"),
        (["--exit_loss_weights", "[a, b, c]"], "expected a list of numbers"),
        (["--exit_training", "two_step", "--first_step_epochs", "4"], "leave no epochs for the second step"),
        (["--calibrate_mean_layer", "2", "--exit_threshold", "0.5"], "give only one of"),
        (["--exit_training", "three_step"], "expected joint or two_step"),
        (["--exit_loss_weights", "[1, 2]"], "expected 3 weights"), (["--exit_threshold", "low"], "expected a number, got 'low'"),
        (["--exit_rule", "none", "--calibrate_mean_layer", "2"], "has no threshold to calibrate"),
    ],
)  # fmt: skip
def test_mistakes_are_said(exits: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(EarlyExitBrain, [*exits, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with exits, trained once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("exits")
    yaml = write_tiny_yaml(folder / "tiny.yaml", make_corpus(folder / "corpus"), folder)
    yaml.write_text(yaml.read_text().replace("layers: 1\n", "layers: 3\n"))
    assert run(EarlyExitBrain, [*with_exits(yaml), "--number_of_epochs", "30", "--batch_size", "4"]) == 0
    return folder / "output/model"


@pytest.mark.parametrize("rule", ["none", "entropy", "similarity", "confidence", "agreement"])
def test_a_sweep_says_what_running_would(trained: Path, corpus: Path, rule: str) -> None:
    """Hypotheses, exit layers and MACs at a threshold, from one pass, are those of a pass at that threshold."""
    model = CTCModel.load(trained)
    benchmark = Benchmark.from_manifest(corpus / "test.jsonl")
    found = sweep(model, benchmark)
    values = np.unique(found.scores[rule][:, :-1])
    for threshold in [NEVER[rule], *((values[1:] + values[:-1]) / 2)]:
        for patience in (1, 2):
            model.head.set_rule(rule, float(threshold), patience)
            measured = score(CTCTranscriber(model), benchmark)
            predicted = found.records(benchmark, rule, found.exits(rule, threshold, patience))
            for ours, theirs in zip(predicted, measured, strict=True):
                assert ours == pytest.approx(theirs)


def test_calibration_meets_what_was_wanted(trained: Path, corpus: Path) -> None:
    found = sweep(CTCModel.load(trained), Benchmark.from_manifest(corpus / "test.jsonl"), macs=False)
    for rule in ("entropy", "similarity", "confidence"):
        for wanted in (1.0, 3.0):
            out = found.exits(rule, found.choose_threshold(rule, mean_layer=wanted))
            assert found.mean_layer(out) == wanted
        out = found.exits(rule, found.choose_threshold(rule, wer_loss_percent=0.0))
        assert found.wer_percent(out) <= found.wer_percent(-1)
    with pytest.raises(UserError, match="exactly one"):
        found.choose_threshold("entropy")


@pytest.mark.parametrize("wanted", [1.5, 2.0, 2.9])
def test_calibration_finds_what_lies_between(wanted: float) -> None:
    rng = np.random.default_rng(0)
    entropies, errors = rng.random((200, 3)), np.tile([2, 1, 0], (200, 1))
    found = Sweep([1, 2, 3], [], [], errors, 1000, {"entropy": entropies}, np.zeros(0), np.zeros(0))
    out = found.exits("entropy", found.choose_threshold("entropy", mean_layer=wanted))
    assert found.mean_layer(out) == pytest.approx(wanted, abs=0.006)
    loss_percent = 100 * 200 * (3 - wanted) / 1000  # an error for every layer that is left out
    out = found.exits("entropy", found.choose_threshold("entropy", wer_loss_percent=loss_percent))
    assert loss_percent - 0.2 <= found.wer_percent(out) <= loss_percent
    never = found.choose_threshold("entropy", wer_loss_percent=0.0)
    assert found.mean_layer(found.exits("entropy", never)) == 3


def test_agreement_is_never_calibrated_to_a_single_head() -> None:
    distances = np.tile([np.inf, 0.5, 0.1], (50, 1))
    found = Sweep([1, 2, 3], [], [], np.zeros((50, 3), int), 100, {"agreement": distances}, np.zeros(0), np.zeros(0))
    out = found.exits("agreement", found.choose_threshold("agreement", wer_loss_percent=0.5))
    assert out.tolist() == [1] * 50


def test_a_model_without_exits_cannot_be_swept(tiny_ctc: CTCModel, corpus: Path) -> None:
    with pytest.raises(UserError, match="has no exit heads"):
        sweep(tiny_ctc, Benchmark.from_manifest(corpus / "test.jsonl"))


@pytest.mark.slow
def test_sweep_script(trained: Path, corpus: Path, tmp_path: Path) -> None:
    command = [
        "recipes/early_exit/sweep.py",
        str(trained),
        "--manifest",
        str(corpus / "test.jsonl"),
        "--rule",
        "entropy",
    ]
    more = ["--thresholds", "0.5", "1.0", "--out", str(tmp_path / "sweep")]
    done = run_script(*command, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert {
        "sweep_entropy-test.png",
        "sweep_entropy-test.md",
        "sweep_entropy_0.5-test.json",
        "sweep_entropy_1-test.json",
    } <= names
    assert "| never | 3.00 |" in done.stdout
    done = run_script(*command, "--calibrate_mean_layer", "2")
    assert done.returncode == 0 and "--exit_rule entropy --exit_threshold" in done.stdout
    done = run_script(*command)
    assert done.returncode == 2 and "give either --thresholds" in done.stderr


def test_stacked_with_downsampling(exits: list[str], tmp_path: Path) -> None:
    yaml = Path(exits[0])
    own = f"    - !include:{ROOT_TAG}/hparams/_base/downsampling.yaml\nexperiment: tiny\nrecipe: early_exit\n"
    yaml.write_text(yaml.read_text().replace("experiment: tiny\n", own, 1).replace("recipe: early_exit\n", "", 1))
    options = [
        "--downsampling_technique",
        "average",
        "--frames_per_state",
        "2",
        "--exit_rule",
        "entropy",
        "--exit_threshold",
        "9",
    ]
    assert run(EarlyExitBrain, [*exits, *options]) == 0
    assert result_of(tmp_path / "results")["technique"] == "downsampling + early_exit"
    model = CTCModel.load(tmp_path / "output/model")
    with torch.no_grad():
        together = model.recognise(*pad_wavs(make_wavs()))
    assert [entry["exit_layer"] for entry in together.details] == [1] * 4


def test_the_loss_is_the_weighted_sum_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[EarlyExitBrain.__module__], "ctc_loss", lambda log_probs, *_: log_probs.sum())
    model = SimpleNamespace(head=SimpleNamespace(layers=[2, 4, 6]))
    brain = object.__new__(type("Bare", (EarlyExitBrain,), {"model": model}))
    brain.hparams = SimpleNamespace(exit_loss_weights=[0.5, 2.0, 3.0], exit_training="joint")
    losses = torch.tensor([[1.0], [10.0], [100.0]])
    assert float(brain.compute_objectives((losses, None), None, sb.Stage.TRAIN)) == 0.5 + 20.0 + 300.0
    brain.hparams.exit_loss_weights = None
    assert float(brain.compute_objectives((losses, None), None, sb.Stage.TRAIN)) == 111.0
