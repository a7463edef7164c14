"""Every YAML loads, every key in it is used, documented and short."""

from __future__ import annotations

import functools
import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.settings.yaml import load_hparams, merge_includes
from efficient_asr.utils.errors import UserError

EXPERIMENTS = sorted(p for p in (ROOT / "hparams").rglob("*.yaml") if p.parent.name != "_base")
CODE = "\n".join(p.read_text() for folder in ("efficient_asr", "recipes") for p in (ROOT / folder).rglob("*.py"))


YAMLS = "\n".join(p.read_text() for p in (ROOT / "hparams").rglob("*.yaml"))
DECODING = [field.name for field in fields(DecodingOptions)]  # taken from the YAML by their names


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "hparams"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_yaml_loads(path: Path, monkeypatch: pytest.MonkeyPatch, ssl_sources: dict[str, str], tmp_path: Path) -> None:
    monkeypatch.setenv("EFFICIENT_ASR_DATA", str(tmp_path))
    monkeypatch.setenv("EFFICIENT_ASR_MODELS", str(tmp_path))
    tree = merge_includes(path)
    must = ("data_folder", "manifest", "digit_strings")  # be given by the user
    overrides = {key: str(tmp_path) for key in must if "PLACEHOLDER" in str(getattr(tree.get(key), "tag", ""))}
    if tree.get("noise_manifest"):
        overrides["noise_manifest"] = None  # read at once
    if "encoder" in tree and not str(tree["source"]).startswith("efficient_asr:"):
        overrides["source"] = ssl_sources["wavlm-large"]
    hparams, plain = load_hparams(path, overrides)
    assert hparams["recipe"] and plain["experiment"]
    if "encoder" in tree:
        assert hparams["encoder"].num_layers > 0
    folder = ROOT / "recipes" / hparams["recipe"]
    assert (folder / "train.py").is_file() or (folder / "label.py").is_file()


@functools.cache
def is_used(key: str) -> bool:
    return bool(
        key.startswith("__")
        or key in RunOptions().as_dict()
        or f"<{key}>" in YAMLS
        or re.fullmatch(r"(encoder|head|model|gates)_(optimizer|scheduler)", key)  # read by getattr
        or key in DECODING
        or re.search(rf"""["']{key}["']|hparams\.{key}\b""", CODE)
    )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_key_is_used(path: Path) -> None:
    assert not [key for key in merge_includes(path) if not is_used(key)]
    assert not is_used("nothing_reads_this")


@pytest.mark.parametrize("path", sorted((ROOT / "hparams").rglob("*.yaml")), ids=name_of)
def test_yaml_is_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#") and len(lines) <= (80 if path.parent.name == "_base" else 60)


@pytest.mark.parametrize("path", sorted((ROOT / "hparams" / "_base").glob("*.yaml")), ids=name_of)
def test_new_knobs_have_a_comment(path: Path) -> None:
    """Where a plain key first appears it says what it is; files that only set values again need not."""
    if path.name in ("experiment.yaml", "ctc.yaml", "downsampling.yaml"):
        plain = [x for x in path.read_text().splitlines() if re.match(r"^[a-z]\w*: (?!!(new|name|apply|include))\S", x)]
        uncommented = [x for x in plain if "#" not in x and not re.match(r"(recipe|variant|snr_high_db)", x)]
        assert not uncommented


def test_includes_merge_and_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\ny: !ref <x>\n")
    (tmp_path / "b.yaml").write_text("z: 3\n")
    (tmp_path / "c.yaml").write_text("base:\n  - !include:a.yaml\n  - !include:b.yaml\nx: 5\n")
    hparams, _ = load_hparams(tmp_path / "c.yaml", {"z": 4})
    assert (hparams["x"], hparams["y"], hparams["z"]) == (5, 5, 4)


def test_paths_may_name_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    text = "experiment: a$b\nlm_path: ~/lm.arpa\noutput_folder: !ref $SCRATCH/<experiment>_1\nnoise_manifest: $SCRATCH/n.jsonl\n"
    text += "part: en\ndigits: $SCRATCH/d\nrir_manifest: !ref <digits>/<part>.jsonl\nteacher_cache: $SCRATCH/cache\n"
    (tmp_path / "x.yaml").write_text(text)
    hparams, plain = load_hparams(tmp_path / "x.yaml", {"experiment": "e"})
    assert hparams["output_folder"] == "/scratch/me/e_1"
    assert (hparams["noise_manifest"], hparams["lm_path"]) == ("/scratch/me/n.jsonl", "/home/me/lm.arpa")
    assert (hparams["rir_manifest"], hparams["teacher_cache"]) == ("/scratch/me/d/en.jsonl", "/scratch/me/cache")
    # a result names no folders of this machine
    assert (plain["noise_manifest"], plain["output_folder"]) == ("$SCRATCH/n.jsonl", "$SCRATCH/e_1")
    assert plain["rir_manifest"] == "$SCRATCH/d/en.jsonl"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(
        UserError, match=r"noise_manifest: '\$SCRATCH/n.jsonl' uses an environment variable that is not set"
    ):
        load_hparams(tmp_path / "x.yaml", {})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("x: 1\n", {"xx": 2}, "Did you mean 'x'"),
        ("x: 1\n", {"x": "many"}, "expected int for x, got 'many' \\(default 1\\)"),
        ("flag: False\n", {"flag": "yes please"}, "expected True or False for flag"),
        ("x: !PLACEHOLDER\n", {}, "'x' must be given"),
        ("x: [1\n", {}, "not valid YAML"),
        ("base: other.yaml\n", {}, "base must be"),
        ("base: !include:none.yaml\n", {}, "no YAML file at"),
        ("x: !new:efficient_asr.nothing.Here {}\n", {}, "nothing"),
        (
            "x: !new:efficient_asr.techniques.downsampling.Downsampler\n    technique: avrage\n",
            {},
            "Did you mean 'average'",
        ),
        ("x: !new:efficient_asr.techniques.downsampling.Downsampler\n    factr: 2\n", {}, "factr"),
        ("- 1\n", {}, "contains no keys"),
    ],
)
def test_mistakes_are_explained(text: str, overrides: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_hparams(tmp_path / "x.yaml", overrides)
