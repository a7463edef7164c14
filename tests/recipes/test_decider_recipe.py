"""From passes over a corpus to a trained cascade, as a user goes: scripts, recipe, comparison."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, chirp
from runs import run_script

from efficient_asr import load_transcriber
from efficient_asr.commands import calibrate
from efficient_asr.data import FeatureStore, load_audio, read_manifest
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.techniques.decider.analysis import Pair, read_records
from efficient_asr.techniques.decider.comparison import encoder_time_s
from efficient_asr.techniques.decider.data import encoder_macs_g
from efficient_asr.utils.errors import UserError

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_whispers: dict[str, str]) -> Path:
    """A corpus of 16 utterances and the passes of both models over it, with errors that are made up."""
    root = tmp_path_factory.mktemp("routing")
    for split, count in (("train", 12), ("dev", 8), ("test", 4)):
        rows = []
        for i in range(count):
            wav = chirp(0.5 + 0.1 * i, 100 + 40 * i, 400)
            soundfile.write(root / f"{split}{i}.wav", wav, 16000)
            row = {
                "id": f"{split}{i}",
                "audio": f"{split}{i}.wav",
                "duration": len(wav) / 16000,
                "text": "turn on the light",
            }
            rows.append(row | {"language": "en"})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, source in tiny_whispers.items():
        for split in ("train", "dev", "test"):
            label(root, name, source, split)
            path = root / "labels" / f"{name}-{split}.jsonl"
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for i, record in enumerate(records):
                record["errors"] = 1 if name == "large" else 3 * (i % 2)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def label(root: Path, name: str, source: str, split: str, *options: str) -> Any:
    return run_script(
        "recipes/decider/label.py", source, "--manifest", str(root / f"{split}.jsonl"), "--out",
        str(root / "labels" / f"{name}-{split}.jsonl"), "--states", str(root / "states" / f"{name}-{split}"), *options,
    )  # fmt: skip


def train(place: Path, tiny_whispers: dict[str, str], out: Path, *extra: str) -> Any:
    options = {
        "small": tiny_whispers["small"], "large": tiny_whispers["large"], "small_name": "small", "large_name": "large",
        "corpus_options": "{}", "data_folder": place, "prepared_folder": out / "prepared", "output_folder": out / "output",
        "results_folder": out / "results", "labels_folder": place / "labels", "states_folder": place / "states",
        "test_splits": "[test]", "channels": "[8]", "strides": "[2]", "frames": "padded", "number_of_epochs": 2, "batch_size": 4,
        "test_normaliser": "plain", "max_tokens_per_s": "null",
    } | dict(zip([key.removeprefix("--") for key in extra[::2]], extra[1::2], strict=True))  # fmt: skip
    pairs = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return run_script("recipes/decider/train.py", "hparams/real/decider.yaml", *pairs)


def test_passes_hold_states_costs_and_confidence(place: Path, tiny_whispers: dict[str, str]) -> None:
    records = [json.loads(line) for line in (place / "labels" / "small-dev.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"dev{i}" for i in range(8)]
    for record in records:
        assert record["macs_g"] > 0 and record["time_s"] > 0 and record["reference_words"] == 4
        assert record["avg_logprob"] < 0 < record["entropy"] and "language" not in record  # it was given, not detected
    store = FeatureStore(place / "states" / "small-dev")
    transcriber = load_transcriber(tiny_whispers["small"], language="en", long_audio=None)
    wav = load_audio(str(place / "dev3.wav"))
    hidden = transcriber.encode(wav[None], torch.ones(1), hidden_states=True).hidden_states
    assert torch.equal(store.read("dev3")["states"], torch.stack(hidden, dim=2)[0].half())


def test_states_can_be_added_to_a_pass(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "states" / "small-test")
    before = (tmp_path / "copy" / "labels" / "small-test.jsonl").read_bytes()
    assert label(tmp_path / "copy", "small", tiny_whispers["small"], "test").returncode == 0
    assert len(FeatureStore(tmp_path / "copy" / "states" / "small-test")) == 4
    assert (tmp_path / "copy" / "labels" / "small-test.jsonl").read_bytes() == before


def test_a_pass_goes_on_and_refuses_another_model(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    path = tmp_path / "copy" / "labels" / "small-test.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = label(tmp_path / "copy", "small", tiny_whispers["small"], "test")
    assert done.returncode == 0 and "utterances are already done" in done.stdout
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(ids) == [f"test{i}" for i in range(4)]
    soundfile.write(tmp_path / "copy" / "test0.wav", chirp(0.5, 200, 400), 16000)
    changed = label(tmp_path / "copy", "small", tiny_whispers["small"], "test")
    assert changed.returncode == 2 and "was created with a different audio" in changed.stderr
    shutil.copy(place / "test0.wav", tmp_path / "copy" / "test0.wav")
    other = label(tmp_path / "copy", "small", tiny_whispers["large"], "test")
    assert other.returncode == 2 and "was created with a different model" in other.stderr
    for each in (path, path.with_suffix(".meta.json")):
        each.unlink()
    int8 = label(tmp_path / "copy", "small", tiny_whispers["small"], "test", "--quantise", "int8")
    assert int8.returncode == 2 and "small-test differs in quantise" in int8.stderr


def test_macs_are_counted_when_they_are_needed(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    def records() -> dict[str, dict[str, Any]]:
        return read_records(tmp_path / "labels" / "small-test.jsonl")

    for split in ("test.jsonl", "test0.wav", "test1.wav", "test2.wav", "test3.wav"):
        shutil.copy(place / split, tmp_path / split)
    assert label(tmp_path, "small", tiny_whispers["small"], "test", "--count_macs", "False").returncode == 0
    without = records()
    assert [record["macs_g"] for record in without.values()] == [None] * 4
    pair = Pair.read(*[tmp_path / "labels" / "small-test.jsonl"] * 2)
    with pytest.raises(UserError, match=r"the record of 'test0' has no macs_g: run recipes/decider/label.py again"):
        pair.values("macs_g")
    assert label(tmp_path, "small", tiny_whispers["small"], "test").returncode == 0
    known = read_records(place / "labels" / "small-test.jsonl")
    assert {name: record["macs_g"] for name, record in records().items()} == {
        name: record["macs_g"] for name, record in known.items()
    }
    again = label(tmp_path, "small", tiny_whispers["small"], "test", "--count_macs", "False")
    assert "4 of 4 utterances are already done" in again.stdout


def test_own_length_models(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    """Their encoder costs less for shorter audio, and has no states of a whole window."""
    own = str(tmp_path / "own")
    calibrate.main([tiny_whispers["small"], "--padding_s", "0.1", "--out", own])
    shutil.copytree(place, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "states")
    (tmp_path / "copy" / "labels" / "small-test.jsonl").unlink()
    (tmp_path / "copy" / "labels" / "small-test.meta.json").unlink()
    refused = label(tmp_path / "copy", "small", own, "test")
    assert refused.returncode == 2 and "encodes the audio's own length; pass --frames unpadded" in refused.stderr
    assert label(tmp_path / "copy", "small", own, "test", "--frames", "unpadded").returncode == 0
    transcriber = load_transcriber(own, language="en", long_audio=None)
    durations = np.array([0.5, 1.1, 0.5])
    costs = encoder_macs_g(transcriber, durations)
    assert costs[0] == costs[2] < costs[1]
    wavs = torch.zeros(1, 17600)
    assert costs[1] == pytest.approx(count_macs(transcriber.encode, wavs, torch.ones(1)).macs / 1e9)
    whole = load_transcriber(tiny_whispers["small"], language="en", long_audio=None)
    assert len({*encoder_macs_g(whole, durations)}) == 1
    assert encoder_time_s(transcriber, durations).shape == (3,)


@pytest.mark.parametrize("options", [
    ["--router_input", "encoder", "--calibrate_large_share", "0.5"], ["--router_input", "large_encoder", "--target", "label"],
    ["--router_input", "audio", "--calibrate_macs_g", "1.0"], ["--router_input", "transcript"], ["--router_input", "small_model"],
], ids=["encoder", "large_encoder", "audio", "transcript", "small_model"])  # fmt: skip
def test_recipe_and_comparison(options: list[str], place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    done = train(place, tiny_whispers, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert result["technique"] == "decider" and 0 <= result["details"]["large_model_rate"] <= 1
    assert sum(result["details"]["route_shares"].values()) == pytest.approx(1.0)
    utterances = [json.loads(line) for line in path.with_suffix(".utterances.jsonl").read_text().splitlines()]
    assert {u["route"] for u in utterances} <= {"small", "large"} and all(
        len(u["router_scores"]) == 1 for u in utterances
    )
    model = tmp_path / "output" / "model"
    trained = options[:2] if "--target" not in options else options
    again = train(place, tiny_whispers, tmp_path, "--test_only", "True", *trained)  # with the threshold that it has
    assert again.returncode == 0, again.stderr
    other = train(place, tiny_whispers, tmp_path, "--test_only", "True", *trained, "--calibrate_wer_percent", "50")
    assert other.returncode == 2 and "calibrate_wer_percent: None before, 50 now" in other.stderr
    spoken = run_script("scripts/transcribe.py", str(model), str(place / "test0.wav"), "--language", "en")
    assert json.loads(spoken.stdout)["route"] in ("small", "large")
    out = tmp_path / "compared.json"
    folders = [f"--{name}={place / name}" for name in ("labels", "states")] + [f"--manifests={place}"]
    compared = run_script(
        "recipes/decider/compare.py", "--pair", "small", "large", "--models", *tiny_whispers.values(), *folders, "--tests",
        "test", "train", "--deciders", str(model), "--bootstrap", "20", "--out", str(out),
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    found = json.loads(out.read_text())
    assert (
        len(found["routers"]) == 6
        and found["models"]["all"]["oracle"]["wer_percent"] <= found["models"]["all"]["large"]["wer_percent"]
    )
    assert out.with_suffix(".png").stat().st_size > 10000


def test_new_labels_are_not_mixed_with_old_ones(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    for name in ("labels", "states"):
        shutil.copytree(place / name, tmp_path / name)
    options = ("--router_input", "transcript", "--train_only", "True", "--labels_folder", str(tmp_path / "labels"))
    assert train(place, tiny_whispers, tmp_path, *options).returncode == 0
    path = tmp_path / "labels" / "large-train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record | {"errors": record["errors"] + 1}) + "\n" for record in records))
    done = train(place, tiny_whispers, tmp_path, *options, "--number_of_epochs", "3")
    assert done.returncode == 2 and "labels: " in done.stderr and "settings have changed" in done.stderr, done.stderr
    about = tmp_path / "labels" / "small-train.meta.json"
    decoding = {"language": "en", "max_tokens_per_s": None, "quantise": "decoder-int8"}
    about.write_text(json.dumps(json.loads(about.read_text()) | {"decoding": decoding}))
    limited = train(place, tiny_whispers, tmp_path / "other", *options, "--max_tokens_per_s", "4")
    assert limited.returncode == 2 and "max_tokens_per_s: it is 4, but " in limited.stderr
    assert "small-train.jsonl was written with --quantise decoder-int8: run the cascade" in limited.stdout
    (tmp_path / "states" / "small-train" / "meta.json").write_text(
        (tmp_path / "states" / "small-train" / "meta.json").read_text().replace('"model": "', '"model": "0')
    )
    swapped = train(
        place,
        tiny_whispers,
        tmp_path / "third",
        "--router_input",
        "encoder",
        "--states_folder",
        str(tmp_path / "states"),
    )
    assert swapped.returncode == 2 and "contains states of another model than" in swapped.stderr


@pytest.mark.parametrize("router_input", ["encoder", "small_model"])
def test_states_on_the_fly_train_the_same_decider(
    router_input: str, place: Path, tiny_whispers: dict[str, str], tmp_path: Path
) -> None:
    """Up to the half precision of the store."""
    weights = []
    for i, folder in enumerate((str(place / "states"), "null")):
        done = train(
            place,
            tiny_whispers,
            tmp_path / str(i),
            "--states_folder",
            folder,
            "--train_only",
            "True",
            "--router_input",
            router_input,
        )
        assert done.returncode == 0 and "result:" not in done.stdout, done.stderr
        model = load_transcriber(str(tmp_path / str(i) / "output" / "model"), long_audio=None)
        weights.append(torch.cat([p.flatten() for p in model.routers[0].parameters()]))
    assert float((weights[0] - weights[1]).abs().max()) < 5e-3


def test_training_finds_what_can_be_learned(place: Path, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    options = (
        "--router_input",
        "audio",
        "--number_of_epochs",
        "25",
        "--train_only",
        "True",
        "--lr",
        "0.01",
        "--test_only",
        "False",
    )
    assert train(place, tiny_whispers, tmp_path, *options).returncode == 0
    log = (tmp_path / "output" / "train_log.txt").read_text().splitlines()
    areas = [float(line.partition("valid auc: ")[2].partition(",")[0]) for line in log]
    assert len(areas) == 25 and all("valid balanced_accuracy" in line for line in log)
    assert max(areas) > 0.9 > areas[0]  # the pitch of the chirps alternates with the errors


MISTAKES = [
    (["--states_folder", "/nowhere"], "encoder states: no feature store at"), (["--labels_folder", "/nowhere"], "no records at"),
    (["--calibrate_large_share", "0.5", "--calibrate_macs_g", "1"], "give one of"),
    (["--router_input", "transcripts"], "is not one of audio, encoder"), (["--target", "labels"], "is not label or gain"),
    (["--calibrate_large_share", "30"], "expected a number from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_explained(
    options: list[str], message: str, place: Path, tiny_whispers: dict[str, str], tmp_path: Path
) -> None:
    done = train(place, tiny_whispers, tmp_path, *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_cyclic_schedule_goes_on_where_it_stopped(
    place: Path, tiny_whispers: dict[str, str], tmp_path: Path
) -> None:
    """The paper's learning rate changes with every step: a run in two parts must end as one in one part."""
    weights = []
    schedule = "!new:speechbrain.nnet.schedulers.CyclicLRScheduler {base_lr: 1.0e-6, max_lr: 0.01, step_size: 4}"
    for name, parts in (("whole", ["2"]), ("parts", ["1", "2"])):
        for epochs in parts:
            options = (
                "--train_only",
                "True",
                "--number_of_epochs",
                epochs,
                "--model_scheduler",
                schedule,
                "--router_input",
                "audio",
            )
            done = train(place, tiny_whispers, tmp_path / name, *options)
            assert done.returncode == 0, done.stderr
        model = load_transcriber(str(tmp_path / name / "output" / "model"), long_audio=None)
        weights.append(torch.cat([p.flatten() for p in model.routers[0].state_dict().values()]))
    assert torch.equal(*weights)


def test_noisy_copies(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    part = json.loads((place / "test.jsonl").read_text().splitlines()[0])
    part |= {"audio": str(place / part["audio"]), "start": 0.1, "end": 0.4, "id": "part"}
    (tmp_path / "parts.jsonl").write_text(json.dumps({k: v for k, v in part.items() if k != "duration"}) + "\n")
    for i in range(5):
        soundfile.write(tmp_path / f"n{i}.wav", 0.1 * rng.standard_normal(8000), 16000)
        lines.append(json.dumps({"id": f"n{i}", "audio": f"n{i}.wav", "duration": 0.5}) + "\n")
    (tmp_path / "noises.jsonl").write_text("".join(lines))
    for name in ("a", "b", "parts"):
        manifest = tmp_path / "parts.jsonl" if name == "parts" else place / "test.jsonl"
        done = run_script(
            "scripts/mix_noise.py", str(manifest), "--noise", str(tmp_path / "noises.jsonl"), "--part", "test",
            "--out", str(tmp_path / name),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (piece,) = read_manifest(tmp_path / "parts" / "manifest.jsonl")  # a file of its own
    assert "start" not in piece and len(load_audio(piece["audio"])) == pytest.approx(0.3 * 16000, abs=1)
    rows = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    assert {row["noise"] for row in rows} == {"n4"} and all(0 <= row["snr_db"] <= 20 for row in rows)
    assert (tmp_path / "a" / "audio" / "00001.flac").read_bytes() == (
        tmp_path / "b" / "audio" / "00001.flac"
    ).read_bytes()
    for i, row in enumerate(rows):
        clean, noisy = load_audio(str(place / f"test{i}.wav")), load_audio(str(tmp_path / "a" / row["audio"]))
        scale = float((clean * noisy).sum() / (clean * clean).sum())
        noise = noisy - scale * clean
        snr_db = 10 * float(((scale * clean).pow(2).mean() / noise.pow(2).mean()).log10())
        assert snr_db == pytest.approx(row["snr_db"], abs=0.7)


def test_the_papers_script_on_a_small_common_voice(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    """scripts/reproduce_decider.sh with the published settings: labels of both models, decider, cascade, table."""
    clips = tmp_path / "cv" / "clips"
    clips.mkdir(parents=True)
    large = load_transcriber(tiny_whispers["small"], long_audio=None)  # of random weights; the other one writes no word
    for split, count in (("train", 8), ("dev", 8), ("test", 4)):
        lines = "client_id\tpath\tsentence\tup_votes\tdown_votes\n"
        for i in range(count):
            soundfile.write(clips / f"{split}{i}.mp3", chirp(0.6 + 0.1 * i, 100 + 40 * i, 400), 16000)
            heard = large.transcribe_files([clips / f"{split}{i}.mp3"])[0].text if i % 2 else "this"
            lines += f"s{i}\t{split}{i}.mp3\t{heard} and so on\t{i}\t0\n"
        (tmp_path / "cv" / f"{split}.tsv").write_text(lines)
    environment = {
        "SMALL": tiny_whispers["large"], "LARGE": tiny_whispers["small"], "WORK": str(tmp_path / "work"), "VENV": sys.prefix,
        "RESULTS": str(tmp_path / "results"),
    }  # fmt: skip
    options = ["--number_of_epochs", "1", "--num_workers", "0", "--measure_runtime", "False"]
    command = ["bash", "scripts/reproduce_decider.sh", str(tmp_path / "cv"), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "work" / "common_voice-tiny-small.json").read_text())
    assert found["models"]["all"]["utterances"] == 4 and "decider, large encoder first" in found["routers"]
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    assert result["corpus"] == "common_voice" and set(result["details"]["route_shares"]) == {"tiny", "small"}


def test_help_of_every_script_names_its_options() -> None:
    for script in ("label_routing", "compare_routers", "mix_noise"):
        assert "--out" in run_script(f"scripts/{script}.py", "--help").stdout
    assert (ROOT / "scripts" / "reproduce_decider.sh").is_file()
