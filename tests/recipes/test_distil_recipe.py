"""From audio to a deployed student, each step as a user calls it, on synthetic speech; and on real speech an exact assistant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLACES, ROOT, ROOT_TAG, multilingual_whisper
from runs import run_script
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.data import load_row, read_manifest
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.pruning import prune

LARGE = "efficient_asr:mini_whisper_large"


@pytest.mark.recipe
def test_from_audio_to_a_student_in_six_commands(mini_corpus: dict[str, Path], tmp_path: Path) -> None:
    out, student = str(tmp_path / "labels"), str(tmp_path / "out" / "model")
    labelling = ["hparams/mini/pseudo_labelling.yaml", "--output_folder", out, "--device", "cpu"]
    given = ["--manifest", str(mini_corpus["train"])]
    assert run_script("recipes/pseudo_labelling/label.py", *labelling, *given).returncode == 0
    done = run_script("recipes/pseudo_labelling/filter.py", *labelling, *given, "--max_error_percent", "50")
    assert done.returncode == 0 and "kept" in done.stdout and "filter_report.png" in done.stdout
    assert {"label.yaml", "filter.yaml"} <= {path.name for path in Path(out).iterdir()}  # a copy of the settings

    distilling = ["hparams/mini/distil_whisper.yaml", "--output_folder", str(tmp_path / "out"), "--device", "cpu"]
    done = run_script("recipes/distil_whisper/make_student.py", *distilling)
    assert done.returncode == 0 and "encoder layers: 3" in done.stdout
    manifests = {"train": f"{out}/filtered.jsonl", "dev": str(mini_corpus["dev"]), "test": str(mini_corpus["test"])}
    done = run_script(
        "recipes/distil_whisper/train.py", *distilling, "--number_of_epochs", "1", "--results_folder", str(tmp_path / "runs"),
        "--prepared_folder", str(tmp_path / "data"), "--corpus_options", json.dumps({"manifests": manifests}),
        "--data_folder", out, "--measure_runtime", "False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "runs" / "mini_distil_whisper.json").read_text())
    assert result["wer_percent"] is not None and result["technique"] == "distil_whisper"

    audio = read_manifest(mini_corpus["test"])[0]["audio"]
    done = run_script("scripts/transcribe.py", student, audio, "--language", "en", "--assistant", LARGE)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = run_script("scripts/transcribe.py", student, audio, "--language", "en")
    assert json.loads(done.stdout)["text"] == json.loads(alone.stdout)["text"]
    compared = run_script(
        "efficient_asr/__main__.py", "compare", f"teacher={LARGE}", f"fast={student};encoder_padding=0.5", "--manifest",
        str(mini_corpus["test"]), "--language", "en", "--timed", "2", "--rounds", "1", "--out", str(tmp_path / "compared.json"),
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr[-2000:]
    systems = json.loads((tmp_path / "compared.json").read_text())["systems"]
    assert systems["teacher"]["corpora"]["all"]["difference_percent"] == 0.0
    assert systems["fast"]["parameters"] < systems["teacher"]["parameters"]
    done = run_script(
        "efficient_asr/__main__.py", "export", student, "--to", "transformers", "--out", str(tmp_path / "exported")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_transcriber(str(tmp_path / "exported"), language="en").transcribe_files([audio])[0].text


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("label.py", ["--manifest", "none.jsonl"], "no manifest at"),
        ("label.py", ["--manifest", "{manifest}", "--precision", "bf16"], "--precision: label.py trains nothing"),
        (
            "label.py",
            ["--manifest", "{manifest}", "--columns", "{{text: sentense}}"],
            "no utterance has a column 'sentense'",
        ),
        ("label.py", ["--batch_siz", "3", "--manifest", "x"], "Did you mean 'batch_size'"),
        ("label.py", ["--manifest", "{manifest}", "--teacher_model", "{tmp}"], "config.json"),
        ("label.py", ["--manifest", "{manifest}", "--normaliser", "plane"], "plain"),
        ("filter.py", ["--manifest", "x"], "run recipes/pseudo_labelling/label.py"),
    ],
)
def test_mistakes_are_named(script: str, arguments: list[str], message: str, corpus: Path, tmp_path: Path) -> None:
    places = {"manifest": corpus / "train.jsonl", "tmp": corpus}
    given = [argument.format(**places) for argument in arguments]
    done = run_script(
        f"recipes/pseudo_labelling/{script}",
        "hparams/mini/pseudo_labelling.yaml",
        "--output_folder",
        tmp_path / "out",
        *given,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_going_on_after_a_kill_ends_where_an_uninterrupted_run_ends(corpus: Path, tmp_path: Path) -> None:
    multilingual_whisper(3, layers=2, max_tokens=40).save(tmp_path / "teacher")
    yaml = tmp_path / "x.yaml"
    yaml.write_text(
        PLACES.format(root=ROOT_TAG, corpus=corpus, out=tmp_path)
        + f"base: !include:{ROOT_TAG}/hparams/_base/distil_whisper.yaml\nexperiment: x\nsource: {tmp_path}/teacher\n"
        + "decoder_layers: 1\ntest_normaliser: plain\nnumber_of_epochs: 3\nbatch_size: 1\nhidden_weight: 0.5\n"
        + f"encoder_states_folder: {tmp_path}/states\n"
    )
    options = "'--device', 'cpu', '--train_only', 'True', '--ckpt_interval_minutes', '0', '--ckpt_interval_steps', '1'"
    code = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
from efficient_asr.techniques.distil_whisper.brain import StudentBrain
from efficient_asr.training.run import run
class Killed(StudentBrain):
    def fit_batch(self, batch):
        if 'KILL' in os.environ and (self.position.epoch, self.step) == (2, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit_batch(batch)
sys.exit(run(Killed, ['{yaml}', {options}, '--output_folder', sys.argv[1]]))
"""

    def train(name: str, **environment: str) -> int:
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        return subprocess.run(
            command, env=os.environ | environment, cwd=ROOT, capture_output=True, check=False
        ).returncode

    assert train("whole") == 0
    assert train("killed", KILL="1") == -signal.SIGKILL
    assert train("killed") == 0
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.real
@pytest.mark.parametrize(("kind", "timestamps"), [("student", False), ("itself", True)])
def test_an_assistant_changes_no_text_of_a_real_whisper(
    kind: str, timestamps: bool, real_data: Path, real_models: Path, tmp_path: Path
) -> None:
    tiny = str(real_models / "whisper-tiny")
    prune(Whisper.from_source(tiny), -1, 2).save(tmp_path / "student")
    options = {"language": "en", "timestamps": timestamps}
    alone = load_transcriber(tiny, **options)
    both = load_transcriber(tiny, assistant=str(tmp_path / "student") if kind == "student" else tiny, **options)
    # An untrained student guesses nothing. The model guesses all of its own words, but not what the rules of timestamps forbid.
    least = 1 if kind == "student" else 2
    for row in list(read_manifest(real_data / "ljspeech" / "manifest.jsonl"))[:3]:
        wav = load_row(row)
        expected, found = (each.transcribe(wav)[0] for each in (alone, both))
        assert found.text == expected.text and found.details["tokens_per_pass"] >= least
        assert found.details.get("segments") == expected.details.get("segments")
