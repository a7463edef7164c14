"""Commands around fast inference: calibrate, the comparison with the padded model, the benchmark beside other programs."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from runs import run_script

from efficient_asr import load_transcriber
from efficient_asr.commands import peers, run_command
from efficient_asr.data import load_row, read_manifest
from efficient_asr.models.sources import resolve_source
from efficient_asr.techniques.audio_context.report import comparison_table as audio_context_table
from efficient_asr.techniques.silence_cache.report import (
    comparison_table,
    distances_table,
    draw_all,
    lengths_table,
    peers_table,
)

MINI = "efficient_asr:mini_whisper_small"


@pytest.fixture
def manifest(wavs: list[torch.Tensor], tmp_path: Path) -> Path:
    """Manifest of utterances of two seconds at most, with texts."""
    import soundfile

    folder, lines = tmp_path / "speech", []
    folder.mkdir()
    for i, wav in enumerate(wavs[:3]):
        soundfile.write(folder / f"{i}.wav", wav.numpy(), 16000)
        row = {"id": str(i), "audio": f"{i}.wav", "duration": len(wav) / 16000, "text": "call anna", "language": "en"}
        lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def test_calibrate_writes_a_model_that_is_used_like_the_original(
    manifest: Path, tmp_path: Path, wavs: list[torch.Tensor], capsys: pytest.CaptureFixture
) -> None:
    assert run_command("calibrate", [MINI, "--out", str(tmp_path / "a")]) == 0
    assert "model with silence cache, 0.2 s, groups of 16 but for 64" in capsys.readouterr().out
    more = ["--manifest", str(manifest), "--padding_s", "0.1", "--group", "5", "--sinks", "3"]
    assert run_command("calibrate", [MINI, "--out", str(tmp_path / "b"), *more]) == 0
    caches = [load_transcriber(tmp_path / name).model.encoder_padding for name in ("a", "b")]
    assert (caches[1].padding_s, caches[1].group, len(caches[1].sinks)) == (0.1, 5, 3)
    assert not torch.equal(caches[0].states, caches[1].states)
    assert load_transcriber(tmp_path / "a", language="en").transcribe(wavs[0][None])[0].text
    assert run_command("calibrate", [MINI, "--out", str(tmp_path / "a")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert run_command("calibrate", [MINI, "--out", str(tmp_path / "c"), "--group", "1", "--sinks", "3"]) == 2
    assert "no position is in a group" in capsys.readouterr().err
    assert run_command("calibrate", ["efficient_asr:mini_downsampled", "--out", str(tmp_path / "c")]) == 2
    assert "is not a Whisper" in capsys.readouterr().err


def test_compare_resumes_and_makes_a_table(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "silence_cache" / "mini.json"
    out.parent.mkdir()
    common = [resolve_source(MINI), "--manifest", manifest, "--out", out, "--variants"]

    def compare(*more: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, [*common, *more])])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "recipes" / "silence_cache" / "compare.py"), run_name="__main__")
        return done.value.code

    assert compare("0.2 s, groups of 4") == 0
    before = json.loads(out.read_text())["variants"]
    assert compare("0.2 s, groups of 4", "1 s, groups of 4, recordings", "--calibration", manifest) == 0
    after = json.loads(out.read_text())["variants"]
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert after["padded"]["all"]["difference_percent"] == 0 and after["padded"]["all"]["identical"] == 3
    table = comparison_table("mini", tmp_path)
    assert "| padded |" in table and "| 1 s, groups of 4, recordings |" in table and "3 utterances, 6 words" in table
    assert compare("0.2 s, groups of 4", "--utterances", "2") == 2
    assert "other utterances; choose another file" in capsys.readouterr().err


def test_long_recordings_are_compared_in_pieces(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import soundfile

    common = [resolve_source(MINI), "--manifest", manifest, "--out", tmp_path / "own.json", "--variants"]
    assert run_recipe("compare.py", monkeypatch, *common, "0.2 s, groups of 4, recordings") == 2
    assert "needs recordings; give --calibration" in capsys.readouterr().err
    assert run_recipe("compare.py", monkeypatch, *common, "0.2 s, groups of 4", "--long") == 2
    assert "no utterance of at least 29.5 s" in capsys.readouterr().err
    wav = torch.cat([load_row(row) for row in read_manifest(manifest)]).repeat(12)
    soundfile.write(manifest.parent / "long.flac", wav.numpy(), 16000)
    row = {"id": "long", "audio": "long.flac", "duration": len(wav) / 16000, "text": "call anna", "language": "en"}
    long = manifest.with_name("long.jsonl")
    long.write_text(json.dumps(row) + "\n")
    out = ["--out", tmp_path / "long.json", "--long", "--variants", "0.2 s, groups of 4"]
    assert run_recipe("compare.py", monkeypatch, resolve_source(MINI), "--manifest", manifest, long, *out) == 0
    found = json.loads((tmp_path / "long.json").read_text())
    assert found["key"]["utterances"] == ["long"] and found["variants"]["padded"]["all"]["words"] == 2


def test_an_export_is_compared_on_a_manifest(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--to", "transformers", "--manifest", str(manifest)]
    assert run_command("calibrate", [MINI, "--out", str(tmp_path / "own")]) == 0
    assert run_command("export", [str(tmp_path / "own"), *common, "--out", str(tmp_path / "a")]) == 0
    assert "3 of 3 transcripts are the same" in capsys.readouterr().out
    assert "encoder_padding" not in json.loads((tmp_path / "a" / "config.json").read_text())
    monkeypatch.setattr(peers, "transformers_pipeline", lambda *_: lambda wavs: ["something else"] * len(wavs))
    assert run_command("export", [MINI, *common, "--out", str(tmp_path / "b")]) == 2
    captured = capsys.readouterr()
    assert "not as good" in captured.err and "0 of 3 transcripts are the same" in captured.err
    assert run_command("export", [MINI, "--to", "speechbrain", "--out", str(tmp_path / "c")]) == 2
    assert "is not a CTC model" in capsys.readouterr().err


def run_recipe(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "recipes" / "silence_cache" / script), run_name="__main__")
    return done.value.code


def test_other_models_and_engines_are_compared(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ASR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "audio_context" / "mini.json"
    out.parent.mkdir()
    common = [resolve_source(MINI), "--manifest", manifest, "--out", out]
    models = ["--models", f"the same={resolve_source(MINI)}"]
    assert run_recipe("compare.py", monkeypatch, *common, "--variants", "cache, int8 decoder", *models) == 0
    found = json.loads(out.read_text())["variants"]
    assert list(found) == ["padded", "cache, int8 decoder", "the same"]
    assert found["the same"]["all"]["identical"] == 3 and found["the same"]["all"]["ci95_percent"] == [0.0, 0.0]
    table = audio_context_table("mini", tmp_path)
    assert "| variant |" in table and "| the same |" in table and "Calibrated" not in table


def test_digits_are_compared_one_by_one() -> None:
    script = runpy.run_path(str(ROOT / "recipes" / "silence_cache" / "compare.py"))
    assert script["digit_by_digit"]("12 305", "1 23 05") == ("1 2 3 0 5", "1 2 3 0 5")
    assert script["digit_by_digit"]("12", "twelve 12") == ("1 2", "twelve 1 2")
    assert script["digit_by_digit"]("room 12", "room 1 2") == ("room 12", "room 1 2")


def test_distances_by_layer_and_place(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "silence_cache" / "distances-mini.json"
    out.parent.mkdir()
    assert run_recipe("distances.py", monkeypatch, resolve_source(MINI), "--manifest", manifest, "--out", out) == 0
    found = json.loads(out.read_text())
    assert [entry["layer"] for entry in found["layers"]] == [0, "output"] and found["utterances"] == 3
    first, last = (entry["relative_percent"] for entry in found["layers"])
    assert first["speech"] < 0.1  # before the first layer, nothing has seen the silence
    assert 0 < last["speech"] < 50 and 0 < last["cached, 0 to 1 s"] and found["kl_nats"] > 0
    assert 0 < found["attention_to_silence_percent"] < 100 and 0 < found["of_that_to_sinks_percent"] <= 100
    assert "| output |" in distances_table("mini", tmp_path)
    assert (
        run_recipe(
            "distances.py",
            monkeypatch,
            resolve_source(MINI),
            "--manifest",
            manifest,
            "--out",
            out,
            "--encoder_padding",
            "1",
        )
        == 2
    )


def test_times_by_length(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "silence_cache" / "lengths-mini.json"
    out.parent.mkdir()
    common = [resolve_source(MINI), "--manifest", manifest, "--out", out, "--forms", "padded", "cache", "--lengths_s"]
    assert run_recipe("lengths.py", monkeypatch, *common, "0.5", "0.7", "9", "--rounds", "2") == 0
    found = json.loads(out.read_text())
    assert [row["audio_s"] for row in found["rows"]] == [0.5, 0.7] and set(found["rows"][0]["seconds"]) == {
        "padded",
        "cache",
    }
    assert len(found["rows"][0]["rounds"]["cache"]) == 2 and "| 0.50 |" not in lengths_table("mini", tmp_path)
    assert run_recipe("lengths.py", monkeypatch, *common, "9") == 2
    assert "--lengths_s: the recordings have" in capsys.readouterr().err


@pytest.mark.real
def test_faster_whisper_runs_an_exported_real_whisper(real_data: Path, real_models: Path, tmp_path: Path) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    options = ["--to", "faster-whisper", "--out", str(tmp_path / "out"), "--quantise", "int8"]
    assert run_command("export", [str(real_models / "whisper-tiny"), *options]) == 0
    audio = next((real_data / "misc_short").rglob("jfk*"))
    segments, _ = faster_whisper.WhisperModel(str(tmp_path / "out"), device="cpu").transcribe(str(audio), language="en")
    assert "ask not what your country can do for you" in " ".join(segment.text for segment in segments)


@pytest.mark.slow
def test_systems_are_measured_side_by_side(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers" / "mini.json"
    out.parent.mkdir()
    systems = ["ours", "ours, silence cache, int8 decoder", "whisper.cpp"]
    done = run_script(
        "scripts/benchmark_peers.py", resolve_source(MINI), "--manifest", manifest, "--rounds", "2", "--out", out,
        "--batch_sizes", "2", "--work", tmp_path / "work", "--systems", *systems,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(row["label"], row["batch_size"]) for row in result["rows"]] == [(name, 2) for name in systems[:2]]
    assert {name.partition(",")[0] for name in result["missing"]} == {"whisper.cpp"}
    for row in result["rows"]:
        assert row["rounds"] == 2 and row["rtfx"] > 0 and row["peak_memory_bytes"] > 1e6 and len(row["hypotheses"]) == 3
        assert row["ratio_to_ours"] == 1 or row["label"] != "ours"
    assert result["provenance"]["versions"]["torch"]
    table = peers_table("mini", tmp_path)
    assert "| ours, silence cache, int8 decoder |" in table and "whisper.cpp" in table
    assert [path.is_file() for path in draw_all(tmp_path)] == [True]


def test_other_models_run_beside_them(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ASR_CACHE", str(tmp_path / "cache"))
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_peers.py"))
    args = SimpleNamespace(model="/plain", models=[("other", resolve_source(MINI))])
    wavs = [load_row(row) for row in read_manifest(manifest)]
    for end, backend in (("", "torch"), (", int8 decoder, ONNX", "onnx")):
        name, engine, _, recognise = script["system"](f"ours, other{end}", args)
        assert (name, engine) == ("efficient_asr", backend) and recognise.args == (resolve_source(MINI),)
        assert len(recognise("en", 2, tmp_path)(wavs)) == 3
    assert script["system"]("ours", args)[3].args == ("/plain",)


@pytest.mark.slow
def test_the_service_of_the_page_answers(tmp_path: Path, manifest: Path) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (tmp_path / "service.py").write_text(re.search(r"```python service.py\n(.*?)```", page, re.S)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "service.py"), MINI, str(port)]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert f"listening on port {port}" in service.stdout.readline()
        audio = (manifest.parent / "0.wav").read_bytes()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data=audio) as answer:
            expected = load_transcriber(MINI, language="en").transcribe_files([manifest.parent / "0.wav"])[0].text
            assert json.load(answer) == {"text": expected}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", data=b"not audio")
        assert refused.value.code == 400 and "error" in json.load(refused.value)
    finally:
        service.kill()
