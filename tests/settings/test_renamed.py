"""Names of earlier versions in YAML files, on the command line and in checkpoints work, with a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficient_asr.settings import renamed
from efficient_asr.settings.renamed import MOVED, current_settings
from efficient_asr.settings.yaml import load_hparams, merge_includes
from efficient_asr.utils.technique import merged, techniques

OLD = """
# A YAML file of the first version.
go_on: True                      # resume whatever has changed
again: !ref <go_on>
looks_at: transcript
frames: own
recipe: clsr_distillation
encoder: !apply:efficient_asr.models.whisper.new_whisper_encoder
    d_model: 16
    layers: 1
    heads: 2
augment: !new:efficient_asr.augmentation.Augment {}
loss: !name:efficient_asr.techniques.distillation.DistillationLoss
    kind: js
schedule: !new:efficient_asr.schedules.LinearSchedule [0.1]
__set_seed: !apply:efficient_asr.experiment.seed_everything [3]
"""


@pytest.fixture(autouse=True)
def warn_again() -> None:
    renamed._warn.cache_clear()


def test_a_yaml_file_of_the_first_version_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    hparams, _ = load_hparams(tmp_path / "old.yaml", {})
    assert hparams["allow_changed_settings"] is True and hparams["again"] is True and "go_on" not in hparams
    assert (hparams["router_input"], hparams["frames"], hparams["recipe"]) == ("transcript", "unpadded", "clsr")
    assert hparams["encoder"].num_layers == 1 and hparams["loss"]().kind == "js" and hparams["schedule"].lr == 0.1
    warnings = capsys.readouterr().err
    for name in ("'go_on' is now 'allow_changed_settings'", "'frames: own' is now 'frames: unpadded'", "old.yaml"):
        assert name in warnings
    assert warnings.count("'efficient_asr.augmentation.Augment' is now") == 1


def test_a_renamed_key_keeps_its_place_and_comment(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("a: 1\ngo_on: False  # whatever\nb: 2\n")
    tree = merge_includes(tmp_path / "old.yaml")
    assert list(tree) == ["a", "allow_changed_settings", "b"]
    assert "whatever" in tree.ca.items["allow_changed_settings"][2].value


def test_former_keys_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "new.yaml").write_text("allow_changed_settings: False\nrouter_input: audio\nframes: padded\n")
    hparams, _ = load_hparams(tmp_path / "new.yaml", {"go_on": True, "looks_at": "encoder", "frames": "own"})
    assert hparams == {"allow_changed_settings": True, "router_input": "encoder", "frames": "unpadded"}
    assert "'looks_at' is now 'router_input'" in capsys.readouterr().err


def test_a_key_of_ones_own_may_have_a_former_name(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("x: 1\n")
    assert "looks_at" not in merge_includes(tmp_path / "own.yaml")


def test_every_former_path_leads_somewhere() -> None:
    assert len(MOVED | merged("moved")) >= 6
    for former, path in (MOVED | merged("moved")).items():
        module, _, name = path.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), former
    for technique in techniques():
        for former, part in technique.former_names.items():
            assert part in technique.parts, former
        for reference in (
            *technique.parts.values(),
            *technique.folder_kinds.values(),
            *technique.page_markers.values(),
        ):
            assert technique.load(reference)


def test_settings_of_an_old_checkpoint_compare_with_those_of_today() -> None:
    old = {
        "go_on": "false", "looks_at": "audio", "frames": "own", "lm": "", "flag": "true",
        "augment": "!new:efficient_asr.augmentation.Augment speeds_percent: !ref <speeds_percent>",
        "__set_seed": "!apply:efficient_asr.experiment.seed_everything [!ref <seed>]", "x": "!ref <looks_at>/y",
    }  # fmt: skip
    assert current_settings(old) == {
        "allow_changed_settings": "False", "router_input": "audio", "frames": "unpadded", "lm": "null", "flag": "True",
        "augment": "!new:efficient_asr.data.augmentation.Augment speeds_percent: !ref <speeds_percent>",
        "__set_seed": "!apply:efficient_asr.utils.seeding.seed_everything [!ref <seed>]", "x": "!ref <router_input>/y",
    }  # fmt: skip
