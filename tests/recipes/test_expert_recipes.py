"""The recipes clsr_distillation and lora: they learn, teach, go on exactly, and leave what they promise."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import PLACES, ROOT, ROOT_TAG, TEXTS, chirp, multilingual_whisper
from runs import run_script, torchrun
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain

YAML = (
    PLACES
    + """
base:
    - !include:{root}/hparams/_base/distillation.yaml
    - !include:{root}/hparams/_base/{kind}.yaml
experiment: tiny
source: {source}
number_of_epochs: 2
batch_size: 2
grad_accumulation_factor: 1
lr: 0.003
measure_runtime: False
"""
)
LANGUAGES = ("de", "fr", "de", "en")


def brain_of(recipe: str) -> type[WhisperBrain]:
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", ROOT / "recipes" / recipe / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CLSRBrain if recipe == "clsr" else module.LoraBrain


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Four utterances in three languages, a student and a teacher."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for i, (text, language) in enumerate(zip(TEXTS, LANGUAGES, strict=True)):
        soundfile.write(folder / f"u{i}.wav", chirp(0.8 + i / 10, 100 + 50 * i, 400), 16000)
        rows.append({"id": f"u{i}", "audio": f"u{i}.wav", "duration": 0.8 + i / 10, "text": text, "language": language})
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    multilingual_whisper(seed=1, layers=1).save(tmp_path / "student")
    multilingual_whisper(seed=2, layers=2).save(tmp_path / "teacher")
    return tmp_path


def train(places: Path, out: str, *options: str, recipe: str = "clsr", brain: type[WhisperBrain] | None = None) -> int:
    """Run a recipe, or another brain on its YAML file; returns the exit code."""
    (places / out).mkdir(exist_ok=True)
    kind = {"clsr": "experts", "lora": "lora"}[recipe]
    text = YAML.format(root=ROOT_TAG, corpus=places / "corpus", out=places / out, source=places / "student", kind=kind)
    (places / out / "x.yaml").write_text(text)
    return run(brain or brain_of(recipe), [str(places / out / "x.yaml"), "--device", "cpu", *options])


def speak(places: Path, split: str, language: str | None) -> None:
    """Give every utterance of a split another language."""
    path = places / "corpus" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "language": language}) + "\n" for row in rows))


def result_of(places: Path, out: str) -> dict:
    return json.loads((places / out / "results" / "tiny.json").read_text())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["js", "kl"])
def test_experts_are_taught(places: Path, kind: str, cached: bool, capsys) -> None:
    options = ["--languages", "[de, fr]", "--teacher", str(places / "teacher"), "--distillation_loss", kind]
    options += ["--teacher_cache", str(places / "kept")] if cached else []
    assert train(places, "a", *options) == 0
    result = result_of(places, "a")
    assert set(result["details"]["languages"]) == {"de", "en", "fr"}
    assert result["details"]["macro_wer_percent"] == pytest.approx(
        sum(entry["wer_percent"] for entry in result["details"]["languages"].values()) / 3
    )
    assert result["details"]["experts"] == ["de", "fr"] and result["technique"] == "clsr"
    weights = load_file(places / "a" / "output" / "model" / "expert.german.safetensors")
    assert sum(value.numel() for value in weights.values()) == result["details"]["expert_parameters"]
    assert result["details"]["trained_parameters"] == 2 * result["details"]["expert_parameters"]
    assert set(result["details"]["gate_usage"]) == {"encoder.0", "decoder.0"}
    plain = load_file(places / "student" / "model.safetensors")
    after = load_file(places / "a" / "output" / "model" / "model.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in after.items())
    assert any(
        not torch.equal(weights["encoder.layers.0.fc1.weight"], plain[f"model.{side}.layers.0.fc1.weight"])
        for side in ("encoder",)
    )
    if cached:
        assert "ran the teacher on 4 utterances" in capsys.readouterr().out
        assert train(places, "b", *options) == 0
        assert "ran the teacher on 0 utterances" in capsys.readouterr().out


def test_what_a_teacher_says_matters(places: Path) -> None:
    multilingual_whisper(9, layers=2).save(places / "other")
    base = ["--languages", "[de]", "--train_only", "True"]
    for name in ("teacher", "other"):
        assert train(places, f"by_{name}", *base, "--teacher", str(places / name)) == 0
    one, other = (
        load_file(places / name / "output" / "model" / "expert.german.safetensors")
        for name in ("by_teacher", "by_other")
    )
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_experts_learn(places: Path) -> None:
    """All of the adaptation is in the experts, and it is real generation that is scored."""
    learn = [
        "--number_of_epochs",
        "60",
        "--lr",
        "0.01",
        "--lr_gates",
        "0.01",
        "--gate_budget",
        "1.0",
        "--label_smoothing",
        "0.0",
    ]
    assert train(places, "a", *learn) == 0
    found = [load_transcriber(str(places / name), language="manifest") for name in ("student", "a/output/model")]
    benchmark = Benchmark.from_manifest(
        places / "corpus" / "test.jsonl", normaliser="multilingual", language="manifest"
    )
    before, after = (evaluate(each, benchmark, measure_macs=False, repeats=0).wer_percent for each in found)
    assert before >= 90 and after < 80, (before, after)
    assert result_of(places, "a")["wer_percent"] == after


def test_learned_weights_of_the_losses_are_kept_and_learned(places: Path) -> None:
    options = ["--teacher", str(places / "teacher"), "--learn_sigma", "True", "--train_only", "True"]
    assert train(places, "a", *options) == 0
    (checkpoint,) = (places / "a" / "output" / "save").glob("CKPT+epoch-0002")
    learned = load_file(checkpoint / "model.safetensors")["training_modules.distillation.log_sigma"]
    assert not torch.allclose(learned, torch.tensor([1.41, 1.0]).log(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["clsr", "lora"])
def test_going_on_after_a_kill_ends_where_an_uninterrupted_run_ends(places: Path, recipe: str) -> None:
    options = ["--train_only", "True", "--teacher", str(places / "teacher"), "--teacher_cache", str(places / "kept")]
    options += ["--ckpt_interval_steps", "1", "--ckpt_interval_minutes", "0"]
    if recipe == "lora":
        options += ["--lora_merge", "False"]
    assert train(places, "whole", *options, recipe=recipe) == 0
    arguments = f"Path({str(places)!r}), 'parts', *{options!r}, recipe={recipe!r}"
    code = f"from test_expert_recipes import *; kill_at(4); train({arguments})"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'tests' / 'recipes'}"
    }  # a process of its own: threads do not survive a fork
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert list((places / "parts" / "output" / "save").glob("CKPT+epoch-0001-batch-0000001"))
    assert train(places, "parts", *options, recipe=recipe) == 0
    files = sorted(
        path.relative_to(places / "whole") for path in (places / "whole" / "output" / "model").rglob("*.safetensors")
    )
    assert len(files) == {"clsr": 4, "lora": 2}[recipe]
    for file in files:
        one, other = load_file(places / "whole" / file), load_file(places / "parts" / file)
        assert all(torch.equal(value, other[name]) for name, value in one.items()), file


@pytest.mark.slow
def test_two_processes_train_experts_where_one_has_nothing_to_learn(places: Path) -> None:
    """English has no expert: a process whose batch is English only must still take part in every step."""
    assert train(places, "a", "--languages", "[de]", "--train_only", "True") == 0  # writes the YAML file
    options = ["--languages", "[de]", "--monolingual_batches", "True", "--teacher", str(places / "teacher")]
    done = torchrun(
        ["recipes/clsr/train.py"], places / "two", places / "a" / "x.yaml", *options,
        "--teacher_cache", str(places / "kept"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran the teacher on 4 utterances") == 1
    result = json.loads((places / "two" / "results" / "tiny.json").read_text())
    assert result["utterances"] == 4 and result["details"]["experts"] == ["de"]
    plain = load_file(places / "student" / "model.safetensors")
    after = load_file(places / "two" / "output" / "model" / "model.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in after.items())
    expert = load_file(places / "two" / "output" / "model" / "expert.german.safetensors")
    name = "layers.0.fc1.weight"
    assert any(not torch.equal(expert[f"{s}.{name}"], plain[f"model.{s}.{name}"]) for s in ("encoder", "decoder"))


def kill_at(number: int) -> None:
    """Kill this process at the start of the `number`-th batch."""
    original, calls = WhisperBrain.fit_batch, [0]

    def fit_batch(self: WhisperBrain, batch: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    WhisperBrain.fit_batch = fit_batch


@pytest.mark.parametrize("merge", ["True", "False"])
def test_lora_learns(places: Path, merge: str) -> None:
    learn = [
        "--number_of_epochs",
        "60",
        "--lr",
        "0.01",
        "--label_smoothing",
        "0.0",
        "--lora_rank",
        "8",
        "--lora_merge",
        merge,
    ]
    assert train(places, "a", *learn, recipe="lora") == 0
    result = result_of(places, "a")
    assert result["wer_percent"] < 80 and result["technique"] == "lora"
    assert result["details"]["trained_parameters"] == 2 * 2 * 8 * (16 + 64)
    folder = places / "a" / "output" / "model"
    assert (folder / "lora" / "adapter_model.safetensors").is_file() == (merge == "False")
    assert load_transcriber(str(folder), language="de").model.technique == "lora"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--languages", "[nl]"], "no training utterance has language 'nl'"),
        (["--languages", "[xx]"], "does not know 'xx'"),
        (["--languages", "3"], "does not know '3'"),
        (["--expert_layers", "[encoder.7]"], "encoder.7"),
        (["--expert_layers", "4"], "'4' is not all, encoder"),
        (["--expert_layers", "null"], "expert_layers"),
        (["--expert_dropout", "1.5"], "expert_dropout: expected a number from 0 to 1, got 1.5"),
        (["--label_smoothing", "1.5"], "label_smoothing: expected a number from 0 to 1, got 1.5"),
        (["--distillation_loss", "jsd"], "js"),
        (["--teacher", "/nowhere"], "/nowhere"),
        (["--warmup_ratio", "3"], "warmup_ratio"),
        (["--gate_budget", "1.5"], "gate_budget: expected a number from 0 to 1, got 1.5"),
        (["--teacher", "teacher", "--teacher_cache", "corpus/train.jsonl"], "teacher_cache: cannot write"),
        (["--freeze_encoder", "True"], "freeze_encoder: only the new modules are trained here"),
        (["--activation_checkpointing", "True"], "activation_checkpointing: the layers of this technique"),
    ],
)
def test_mistakes_are_named(places: Path, options: list[str], message: str, capsys) -> None:
    options = [str(places / option) if (places / option).exists() else option for option in options]
    assert train(places, "a", *options) == 2
    assert message in capsys.readouterr().err


def test_a_model_folder_can_be_trained_on(places: Path, capsys) -> None:
    """Another language joins; what was there stays as it is, and other recipes refuse such a folder."""
    assert train(places, "a", "--languages", "[de]", "--train_only", "True") == 0
    folder = places / "a" / "output" / "model"
    assert train(places, "b", "--languages", "fr", "--train_only", "True", "--source", str(folder)) == 0
    both = places / "b" / "output" / "model"
    before, after = (load_file(path / "expert.german.safetensors") for path in (folder, both))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (both / "expert.french.safetensors").is_file()
    assert json.loads((both / "config.json").read_text())["about"]["technique"] == "clsr"
    assert train(places, "c", "--source", str(folder), recipe="lora") == 2
    assert "clsr" in capsys.readouterr().err


def test_plain_weights_that_a_recipe_left_behind_are_of_no_technique_any_more(places: Path) -> None:
    assert train(places, "a", "--train_only", "True", recipe="lora") == 0
    assert train(places, "b", "--source", str(places / "a" / "output" / "model")) == 0
    assert result_of(places, "b")["technique"] == "clsr"


# ---------------------------------------------------------------- what a step is made of


def steps(places: Path, out: str, *options: str, scaled: bool = False) -> tuple[list[dict], int]:
    """Train experts; return of each batch its loss and what went into it, and the exit code."""
    base, seen = brain_of("clsr"), []

    class Spy(base):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            if scaled:
                self.scaler = torch.amp.GradScaler("cpu", enabled=True)

        def fit_batch(self, batch: object) -> torch.Tensor:
            before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
            loss = super().fit_batch(batch)
            changed = {n for n, value in self.model.named_parameters() if not torch.equal(before[n], value)}
            seen.append({"loss": float(loss), "changed": changed, "languages": list(batch.language)} | self.noted)
            return loss

        def compute_objectives(self, predictions: torch.Tensor, batch: object, stage: object) -> torch.Tensor:
            if stage.name == "TRAIN":
                self.noted = {
                    "heard": self.heard, "tokens": batch.tokens[0], "real": self.predicted(batch),
                    "progress": self.model.routing.progress,
                }  # fmt: skip
            return super().compute_objectives(predictions, batch, stage)

    code = train(places, out, "--train_only", "True", *options, brain=Spy)
    return seen, code


STILL = ("--expert_dropout", "0.0", "--skip_gate_prob", "0.0")  # nothing is drawn that changes the first step


def test_the_noise_grows_with_the_true_step(places: Path) -> None:
    seen, _ = steps(places, "a")
    assert [step["progress"] for step in seen] == [0.0, 0.25, 0.5, 0.75]
    seen, _ = steps(places, "b", "--grad_accumulation_factor", "2")
    assert [step["progress"] for step in seen] == [0.0, 0.0, 0.5, 0.5]


def test_the_loss_has_the_distance_of_the_gates_from_their_budget(places: Path) -> None:
    """Gates start at a half, so that the first step's distance is known."""
    first = [steps(places, f"budget{b}", *STILL, "--gate_budget", b)[0][0]["loss"] for b in ("0.5", "1.0", "0.2")]
    assert first[1] - first[0] == pytest.approx(0.5, abs=1e-5)
    assert first[2] - first[0] == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_the_loss_has_the_teachers_divergence(places: Path, kind: str) -> None:
    """Against both formulas in float64, from the two models as they were before."""
    alone, _ = steps(places, "alone", *STILL)
    teach = ("--teacher", str(places / "teacher"), "--distillation_loss", kind, "--sigma", "[2.0, 0.5]")
    taught, _ = steps(places, "taught", *STILL, *teach)
    step = taught[0]
    tokens, real = step["tokens"][:, :-1], step["real"]
    with torch.no_grad():
        p, q = (
            Whisper.from_source(str(places / name))(*step["heard"], tokens)[real].double().softmax(dim=-1)
            for name in ("teacher", "student")
        )
    middle = (p + q) / 2
    divergence = {
        "kl": (p * (p / q).log()).sum(dim=-1),
        "js": ((p * (p / middle).log()).sum(dim=-1) + (q * (q / middle).log()).sum(dim=-1)) / 2,
    }[kind].mean()
    expected = 0.5 * (alone[0]["loss"] / 2.0**2 + float(divergence) / 0.5**2)
    assert step["loss"] == pytest.approx(expected, rel=1e-4)
    assert float(divergence) > 1e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_in_which_nothing_learns_changes_nothing(places: Path, scaled: bool) -> None:
    """French and English have no expert here, and share no batch with German; a gradient scaler (float16) minds neither."""
    options = ("--languages", "[de]", "--monolingual_batches", "True", "--batch_size", "1", "--skip_gate_prob", "0.0")
    seen, code = steps(places, "a", *options, scaled=scaled)
    assert code == 0 and len(seen) == 8
    learned = [bool(step["changed"]) for step in seen]
    assert not any(changed for changed, step in zip(learned, seen, strict=True) if step["languages"] != ["de"])
    # the learning rate is 0 in the last step
    assert [changed for changed, step in zip(learned, seen, strict=True) if step["languages"] == ["de"]].count(
        True
    ) >= 3


def test_a_step_in_which_every_layer_skips_its_gates(places: Path) -> None:
    options = ("--expert_layers", "[decoder.1]", "--skip_gate_prob", "1.0")
    seen, code = steps(places, "a", *options, scaled=True)
    assert code == 0 and len(seen) == 4 and not any(step["changed"] for step in seen)


# ---------------------------------------------------------------- what is refused


def test_another_language_is_no_going_on(places: Path, capsys) -> None:
    for split in ("train", "dev", "test"):
        speak(places, split, None)
    options = ("--train_only", "True", "--language", "de")
    assert train(places, "a", *options, "--number_of_epochs", "1", recipe="lora") == 0
    assert train(places, "a", "--train_only", "True", "--language", "fr", recipe="lora") == 2
    assert "training utterances" in capsys.readouterr().err
    assert train(places, "a", *options, "--test_normaliser", "plain", recipe="lora") == 2
    assert "test_normaliser" in capsys.readouterr().err
    assert train(places, "a", *options, recipe="lora") == 0


def test_a_test_language_that_whisper_lacks_is_named_before_training(places: Path, capsys) -> None:
    speak(places, "test", "it")
    assert train(places, "a", recipe="lora") == 2
    assert "utterance 'u0' of 'test'" in capsys.readouterr().err
    assert not list((places / "a" / "output" / "save").glob("CKPT*"))


def test_a_student_as_it_is_does_not_stand_under_the_techniques_name(places: Path, capsys) -> None:
    assert train(places, "a", "--test_only", "True", "--variant", "CLSR-JS") == 2
    assert "without it first" in capsys.readouterr().err


def test_a_yaml_file_of_another_recipe_is_refused(places: Path) -> None:
    assert train(places, "a", "--train_only", "True") == 0  # writes the YAML file
    command = ["recipes/finetune_whisper/train.py", str(places / "a" / "x.yaml"), "--device", "cpu"]
    done = run_script(*command)
    assert done.returncode == 2 and "belongs to recipes/clsr" in done.stderr, done.stderr


def test_a_teacher_is_refused_where_nobody_asks_it(places: Path, capsys) -> None:
    assert train(places, "a", "--teacher", str(places / "teacher"), brain=WhisperBrain) == 2
    assert "teacher: not used by the recipe clsr" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["trained", "half"])
def test_the_cost_of_experts(places: Path, gates: str) -> None:
    assert train(places, "a", "--languages", "[de, fr]", "--train_only", "True") == 0
    command = [
        "recipes/clsr/cost.py", str(places / "a" / "output" / "model"), "--manifest",
        str(places / "corpus" / "test.jsonl"), "--repeats", "2", "--gates", gates, "--out", str(places / "cost.json"),
    ]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    cost = json.loads((places / "cost.json").read_text())
    assert cost["utterances"] == 4 and len(cost["experts"]) == 5 and len(cost["all_s"]["experts_detecting"]) == 2
    assert cost["ratio"] == cost["experts_s"] / cost["plain_s"]
    plain = load_file(places / "student" / "model.safetensors")
    assert cost["plain_bytes"] == sum(value.numel() * 4 for value in plain.values())
    assert cost["bytes_with_experts"] == cost["plain_bytes"] + 5 * cost["expert_bytes"]


@pytest.mark.recipe
@pytest.mark.parametrize(("recipe", "yaml"), [("clsr", "clsr_js"), ("lora", "lora")])
def test_mini_recipes_as_a_user_calls_them(recipe: str, yaml: str, tmp_path: Path) -> None:
    command = [
        f"recipes/{recipe}/train.py", f"hparams/mini/{yaml}.yaml", "--device", "cpu", "--number_of_epochs", "1",
        "--corpus_options", "{minutes: 1}", "--prepared_folder", str(tmp_path / "data"), "--output_folder", str(tmp_path / "out"),
        "--results_folder", str(tmp_path / "runs"), "--runtime_repeats", "1",
    ]  # fmt: skip
    command += ["--teacher_cache", str(tmp_path / "kept")] if yaml == "clsr_js" else []
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "runs").glob("*.json")
    result = json.loads(path.read_text())
    assert (
        result["synthetic"] is True and result["wer_percent"] < 60 and result["technique"] == recipe.partition("_")[0]
    )
    command = [
        "scripts/evaluate.py", str(tmp_path / "out" / "model"), "--manifest",
        str(tmp_path / "data" / "test.jsonl"), "--language", "en", "--repeats", "0", "--out", str(tmp_path / "again.json"),
        "--normaliser", result["normaliser"],
    ]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["wer_percent"] == result["wer_percent"] and again["technique"] == result["technique"]
    assert again["macs_g"] == pytest.approx(result["macs_g"])
    if yaml == "clsr_js":
        assert again["details"]["gate_usage"] == result["details"]["gate_usage"]


@pytest.mark.recipe
def test_the_papers_script_from_common_voice_to_fleurs(places: Path) -> None:
    """scripts/reproduce_clsr.sh on generated files in the official layouts, with tiny models."""
    head = "client_id\tpath\tsentence\tup_votes\tdown_votes\n"
    for language in ("de", "fr"):
        (places / "cv" / language / "clips").mkdir(parents=True)
        lines = "".join(f"s{i}\t{language}{i}.mp3\t{text}\t{i}\t0\n" for i, text in enumerate(TEXTS))
        for i in range(len(TEXTS)):
            soundfile.write(
                places / "cv" / language / "clips" / f"{language}{i}.mp3", chirp(0.8, 100 + 50 * i, 400), 16000
            )
        for split in ("train", "dev", "test"):
            (places / "cv" / language / f"{split}.tsv").write_text(head + lines)
    for language in ("de_de", "fr_fr", "en_us"):
        (places / "fleurs" / language / "audio" / "test").mkdir(parents=True)
        soundfile.write(places / "fleurs" / language / "audio" / "test" / "a.wav", chirp(0.9, 100, 400), 16000)
        (places / "fleurs" / language / "test.tsv").write_text("1\ta.wav\tOne two.\tone two\to|n\t1\tMALE\n")
    options = [
        "--source",
        str(places / "student"),
        "--batch_size",
        "2",
        "--number_of_epochs",
        "1",
        "--num_workers",
        "0",
    ]
    options += ["--prepared_folder", str(places / "prepared"), "--measure_runtime", "False"]
    environment = os.environ | {
        "METHODS": "clsr_ft",
        "TOGETHER": "1",
        "RESULTS": str(places / "runs"),
        "VENV": sys.prefix,
    }
    folders = [ROOT / "data" / "fleurs-de-fr", ROOT / "output" / "clsr_ft_10k_de_fr"]
    command = [
        "bash",
        "scripts/reproduce_clsr.sh",
        str(places / "cv"),
        str(places / "fleurs"),
        "de",
        "fr",
        "--",
        *options,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = {
            end: json.loads((places / "runs" / f"clsr_ft_10k_de_fr{end}.json").read_text())["details"]
            for end in ("", "-fleurs-transcribe", "-fleurs-translate")
        }
        assert set(found[""]["languages"]) == {"de", "fr"} and found["-fleurs-translate"]["bleu"] >= 0
        assert "bleu" not in found["-fleurs-transcribe"]
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
