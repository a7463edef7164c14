"""What a run shows and keeps of its settings: the merged YAML, the help, where results go."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_corpus
from safetensors.torch import load_file

from efficient_asr.models.ctc import CTCModel
from efficient_asr.settings.yaml import load_hparams, merge_includes
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.data import prepare_splits
from efficient_asr.training.run import run
from efficient_asr.training.schedules import LinearSchedule

FAST = ["--device", "cpu", "--measure_runtime", "False"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_the_merged_yaml_of_a_run_gives_the_same_run(tiny_yaml: Path, tmp_path: Path) -> None:
    options = ["--seed", "7", "--lr_head", "0.002", "--variant", "a: b #2", "--precision", "fp32"]
    assert run(CTCBrain, [str(tiny_yaml), *FAST, *options]) == 0
    merged = tmp_path / "copy.yaml"
    merged.write_bytes((tmp_path / "output" / "hyperparams.yaml").read_bytes())
    tiny_yaml.unlink()  # it must not be needed
    again = ["--output_folder", str(tmp_path / "again"), "--results_folder", str(tmp_path / "again" / "results")]
    assert run(CTCBrain, [str(merged), *FAST, *again]) == 0
    first, second = weights(tmp_path / "output"), weights(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    results = [json.loads((tmp_path / f / "tiny.json").read_text()) for f in ("results", "again/results")]
    assert results[0]["variant"] == results[1]["variant"] == "a: b #2"
    assert results[0]["wer_percent"] == results[1]["wer_percent"] and results[1]["hparams"]["seed"] == 7


def test_print_yaml_runs_nothing_and_is_what_a_run_keeps(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tiny_yaml), *FAST, "--lr_head", "0.002"]
    assert run(CTCBrain, [*arguments, "--print_yaml"]) == 0
    printed = capsys.readouterr().out
    assert "lr_head: 0.002" in printed and "base:" not in printed and not (tmp_path / "output").exists()
    assert run(CTCBrain, arguments) == 0
    assert (tmp_path / "output" / "hyperparams.yaml").read_text() == printed


@pytest.mark.parametrize("path", sorted(ROOT.glob("hparams/*.yaml")), ids=lambda p: p.name)
def test_a_printed_yaml_has_every_key_comment_and_value(
    path: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    tree = merge_includes(path)
    given = {k: "x" for k, v in tree.items() if "PLACEHOLDER" in str(getattr(v, "tag", ""))}
    assert run(CTCBrain, [str(path), "--print_yaml", *(word for k, v in given.items() for word in (f"--{k}", v))]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = merge_includes(tmp_path / "printed.yaml")
    assert list(printed) == list(tree)
    for key, value in tree.items():
        if key not in given and not getattr(value, "tag", None):
            assert printed[key] == value, key
    assert (tmp_path / "printed.yaml").read_text().count("#") > 40


TRAINED = sorted(p.parent.name for p in ROOT.glob("recipes/*/README.md") if (p.parent / "train.py").is_file())


@pytest.mark.parametrize("recipe", TRAINED)
def test_help_of_a_recipe_lists_options_keys_and_an_example(recipe: str, capsys: pytest.CaptureFixture) -> None:
    assert run(CTCBrain, ["--help"], recipe=recipe) == 0
    printed = capsys.readouterr().out
    for text in (
        "--device",
        "--print_yaml",
        "--number_of_epochs",
        "seed of all random number generators",
        "(must be given)",
    ):
        assert text in printed
    example = printed.split("Example:")[1].split()
    assert f"recipes/{recipe}/train.py" in example
    yaml = next(word for word in example if word.endswith(".yaml"))
    assert merge_includes(ROOT / yaml)["recipe"] == recipe


def test_help_of_a_yaml_file_lists_its_keys(capsys: pytest.CaptureFixture) -> None:
    assert run(CTCBrain, [str(ROOT / "hparams" / "mini" / "early_exit.yaml"), "--help"], recipe="early_exit") == 0
    text = capsys.readouterr().out
    assert (
        "--exit_patience" in text
        and re.search(r"--calibrate_wer_loss_percent +0\.5 ", text)
        and "--epoch_counter" not in text
    )


def test_results_go_beside_the_run_and_seeds_do_not_overwrite_each_other(tiny_yaml: Path, tmp_path: Path) -> None:
    text = tiny_yaml.read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("results_folder", "output_folder"))]
    tiny_yaml.write_text("\n".join([*lines, f"output_folder: !ref {tmp_path}/runs/<experiment>/<seed>"]) + "\n")
    for seed in ("1", "2"):
        assert run(CTCBrain, [str(tiny_yaml), *FAST, "--number_of_epochs", "1", "--seed", seed]) == 0
    found = [
        json.loads(p.read_text())["provenance"]["seed"] for p in sorted(tmp_path.glob("runs/tiny/*/results/tiny.json"))
    ]
    assert found == [1, 2]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("hparams/**/*.yaml")), ids=lambda p: str(p.relative_to(ROOT / "hparams"))
)
def test_no_yaml_writes_to_the_committed_results(path: Path) -> None:
    assert not str(merge_includes(path).get("results_folder", "")).startswith("results")


def test_a_yaml_of_another_recipe_is_refused_wherever_it_is_run_from(
    tiny_yaml: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(CTCBrain, [str(tiny_yaml), *FAST], recipe="lora") == 2
    assert "belongs to recipes/finetune_ctc/train.py, not to recipes/lora" in capsys.readouterr().err
    assert run(CTCBrain, [str(tiny_yaml), *FAST, "--recipe", "lora", "--number_of_epochs", "1"], recipe="lora") == 0


def test_nothing_of_a_run_stays_in_the_process(tiny_yaml: Path) -> None:
    logger, stdout = logging.getLogger("speechbrain"), sys.stdout
    before = list(logger.handlers)
    assert run(CTCBrain, [str(tiny_yaml), *FAST, "--number_of_epochs", "1"]) == 0
    assert logger.handlers == before and sys.stdout is stdout


def test_defaults_that_were_hidden_are_keys(tiny_yaml: Path) -> None:
    hparams, _ = load_hparams(tiny_yaml, {"length_jitter": 0.0})
    assert hparams["length_jitter"] == 0.0
    keys = {key for p in (ROOT / "hparams" / "_base").glob("*.yaml") for key in merge_includes(p)}
    assert keys >= {
        "gate_dropout", "gate_noise", "gain_clip", "spec_augment_masks", "spec_augment_frames", "spec_augment_bands",
        "length_jitter", "overlap_s", "long_audio_batch", "max_new_tokens", "suppress", "logprob_threshold",
        "compression_ratio_threshold", "channels", "transcript_width", "train_layerdrop",
    }  # fmt: skip


def test_another_data_folder_does_not_replace_prepared_manifests(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run reads its manifests until it ends."""
    make_corpus(tmp_path / "other")
    options = [*FAST, "--train_only", "True", "--number_of_epochs", "1"]
    assert run(CTCBrain, [str(tiny_yaml), *options]) == 0
    before = (tmp_path / "prepared" / "train.jsonl").read_text()
    more = ["--data_folder", str(tmp_path / "other"), "--output_folder", str(tmp_path / "b")]
    for _ in range(2):
        assert run(CTCBrain, [str(tiny_yaml), *options, *more]) == 0
        assert "prepared holds manifests of other data" in capsys.readouterr().out
    assert (tmp_path / "prepared" / "train.jsonl").read_text() == before
    (folder,) = tmp_path.glob("prepared-*")
    assert str(tmp_path / "other") in (folder / "train.jsonl").read_text()


def test_what_a_run_keeps_is_what_it_was_trained_with(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A command that is refused, and one that only measures, leave the settings of the training alone."""
    common = [str(tiny_yaml), *FAST, "--train_only", "True"]
    assert run(CTCBrain, [*common, "--number_of_epochs", "2"]) == 0
    kept = (tmp_path / "output" / "hyperparams.yaml").read_text()
    assert "number_of_epochs: 2" in kept
    assert run(CTCBrain, [*common, "--number_of_epochs", "2", "--lr_head", "0.5"]) == 2
    assert "settings have changed" in capsys.readouterr().err
    assert run(CTCBrain, [*common, "--number_of_epochs", "1"]) == 2
    assert "number_of_epochs: it is 1, but 2 are done in" in capsys.readouterr().err
    assert run(CTCBrain, [str(tiny_yaml), *FAST, "--test_only", "True"]) == 0
    assert (tmp_path / "output" / "hyperparams.yaml").read_text() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed: expected an integer >= 0"),
        (["--speeds_percent", "[0.95, 1.0]"], "speeds_percent: expected a list of integers from 50 to 200"),
        (["--speeds_percent", "[]"], "speeds_percent: expected a list of integers from 50 to 200"),
        (["--bfloat16_mix_prec"], "--bfloat16_mix_prec: use --precision bf16"),
        (["--remove_vector_weight_decay"], "--remove_vector_weight_decay: not supported"),
    ],
)
def test_values_that_would_fail_late_or_do_nothing(
    options: list[str], message: str, tiny_yaml: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(CTCBrain, [str(tiny_yaml), *FAST, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_longer_schedule_is_reported(capsys: pytest.CaptureFixture) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    first = LinearSchedule(1.0)
    first.start(optimizer, 100)
    first.step = 60
    for total, reported in ((100, False), (200, True)):
        resumed = LinearSchedule(1.0)
        resumed.load_state_dict(first.state_dict())
        resumed.start(optimizer, total)
        assert ("falls until step 200, not 100" in capsys.readouterr().out) == reported
        assert resumed.value == pytest.approx((total - 60) / (total - total // 10))


def test_the_parameters_of_the_encoder_are_found_under_any_name(tiny_ctc: CTCModel) -> None:
    class Compiled(torch.nn.Module):  # as torch.compile wraps a model
        def __init__(self, model: CTCModel) -> None:
            super().__init__()
            self._orig_mod, self.encoder = model, model.encoder

        def named_parameters(self, *arguments: object, **more: object) -> object:
            return ((f"_orig_mod.{name}", value) for name, value in self._orig_mod.named_parameters())

    class Holder:
        model = Compiled(tiny_ctc)

    groups = CTCBrain.parameter_groups(Holder())
    assert {id(p) for p in groups["encoder"]} == {id(p) for p in tiny_ctc.encoder.parameters() if p.requires_grad}
    assert groups["encoder"] and groups["head"]


def test_mini_with_other_options_leaves_the_audio_of_a_running_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hparams = {
        "corpus": "mini", "data_folder": None, "prepared_folder": str(tmp_path / "mini"), "train_split": "train",
        "valid_split": "dev", "test_splits": ["test"], "corpus_options": {"minutes": 0.1},
    }  # fmt: skip
    first = prepare_splits(hparams)
    files = {path: path.read_bytes() for path in (tmp_path / "mini").rglob("*") if path.is_file()}
    other = prepare_splits(hparams | {"corpus_options": {"minutes": 0.1, "corpus_seed": 7}})
    assert "mini holds manifests of other data" in capsys.readouterr().out
    assert other["train"].parent != first["train"].parent and other["train"].read_text() != first["train"].read_text()
    assert all(path.read_bytes() == content for path, content in files.items() if path.name != ".lock")
    assert prepare_splits(hparams) == first
