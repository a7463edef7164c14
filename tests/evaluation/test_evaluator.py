from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXTS

from efficient_asr.data import Row, Rows, load_audio
from efficient_asr.evaluation import runtime
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.runtime import measure_runtime
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel
from efficient_asr.utils.errors import UserError

FIELDS = """experiment recipe technique variant corpus split benchmark_hash utterances audio_s reference_words wer_percent
wer_ci95_percent cer_percent substitutions deletions insertions wer_lm_percent parameters macs_g macs_g_per_audio_s macs_thop_g
runtimes details hparams provenance""".split()
RUNTIME_FIELDS = """device device_name threads batch_size lm runtime_s runtime_min_s runtime_max_s repeats rtfx
peak_memory_bytes""".split()


class Parrot(Transcriber):
    """Says what it was told to, whatever it hears, after one matrix product."""

    def __init__(self, texts: list[str], seconds: float = 0.0) -> None:
        self.texts, self.seconds, self.calls = texts, seconds, 0

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
        time.sleep(self.seconds)
        out = []
        for _ in wavs:
            out.append(Transcript(self.texts[self.calls % len(self.texts)], {"route": self.calls % 2}))
            self.calls += 1
        return out

    def to(self, device: str) -> Parrot:
        return self

    def parameters_count(self) -> int:
        return 7


def test_result_holds_every_field_and_the_right_numbers(corpus: Path, tmp_path: Path) -> None:
    benchmark = Benchmark.from_manifest(corpus / "test.jsonl", corpus="toy")
    parrot = Parrot([TEXTS[0], "turn off the light", "", TEXTS[3] + " now"])
    assert isinstance(parrot, Transcriber)
    result = evaluate(parrot, benchmark, batch_size=2, repeats=2, experiment="x", seed=5, devices=["cpu"])
    data = json.loads(result.save(tmp_path).read_text())
    assert not set(FIELDS) - set(data)
    assert data["reference_words"] == 11 and data["utterances"] == 4
    assert (data["substitutions"], data["deletions"], data["insertions"]) == (1, 1, 1)
    assert data["wer_percent"] == pytest.approx(100 * 3 / 11)
    low, high = data["wer_ci95_percent"]
    assert low <= data["wer_percent"] <= high
    assert data["wer_lm_percent"] is None and data["parameters"] == 7
    assert data["macs_g"] == pytest.approx(30e-9)
    assert data["macs_g_per_audio_s"] == pytest.approx(4 * 30e-9 / data["audio_s"])
    assert {r["batch_size"] for r in data["runtimes"] if r["device"] == "cpu"} == {1, 2}
    assert all(set(r) == set(RUNTIME_FIELDS) for r in data["runtimes"])
    assert data["provenance"]["seed"] == 5
    assert torch.__version__.startswith(
        data["provenance"]["versions"]["torch"].partition("+")[0]
    )  # the local part may differ
    rows = [json.loads(line) for line in (tmp_path / "x.utterances.jsonl").read_text().splitlines()]
    assert [row["errors"] for row in rows] == [0, 1, 1, 1] and rows[1]["route"] == 1
    assert {"id", "duration", "reference", "hypothesis", "errors", "macs_g"} <= set(rows[0])
    assert Result.load(tmp_path / "x.json").to_dict() == data


def test_what_was_not_measured_is_null(corpus: Path) -> None:
    result = evaluate(Parrot(TEXTS), Benchmark.from_manifest(corpus / "test.jsonl"), measure_macs=False, repeats=0)
    assert result.macs_g is None and result.macs_thop_g is None and result.runtimes == []
    assert result.wer_percent == 0.0


def test_benchmark_hash_sees_every_change(corpus: Path) -> None:
    benchmark = Benchmark.from_manifest(corpus / "test.jsonl")
    assert benchmark.hash == Benchmark.from_manifest(corpus / "train.jsonl").hash
    assert benchmark.hash == replace(benchmark, rows=benchmark.rows[::-1]).hash
    changed: list[list[Row]] = [
        benchmark.rows[1:],
        [{**benchmark.rows[0], "text": "other"}, *benchmark.rows[1:]],
        [{**benchmark.rows[0], "id": "other"}, *benchmark.rows[1:]],
        [{**benchmark.rows[0], "duration": 9.0}, *benchmark.rows[1:]],
    ]
    hashes = {replace(benchmark, rows=rows).hash for rows in changed}
    hashes.add(replace(benchmark, normaliser="none", rows=benchmark.rows).hash)
    assert len(hashes) == 5 and benchmark.hash not in hashes


def test_macs_of_a_result_are_those_of_each_forward_pass(corpus: Path, tiny_ctc: CTCModel) -> None:
    benchmark = Benchmark.from_manifest(corpus / "test.jsonl")
    transcriber = CTCTranscriber(tiny_ctc)
    result = evaluate(transcriber, benchmark, repeats=0)
    for row, record in zip(benchmark.rows, result.rows, strict=True):
        alone = count_macs(transcriber.transcribe, load_audio(row["audio"])[None], torch.ones(1))
        assert record["macs_g"] == pytest.approx(alone.macs / 1e9)
    durations = [row["duration"] for row in benchmark.rows]
    costs = [record["macs_g"] for record in result.rows]
    assert sorted(range(4), key=durations.__getitem__) == sorted(range(4), key=costs.__getitem__)


def test_runtime_measures_the_transcriber_only(corpus: Path) -> None:
    rows = Benchmark.from_manifest(corpus / "test.jsonl").rows
    entry = measure_runtime(Parrot(TEXTS, seconds=0.02), rows, "cpu", 1, 3, False)
    assert 0.08 <= entry["runtime_min_s"] <= entry["runtime_s"] <= entry["runtime_max_s"]
    assert entry["runtime_min_s"] < 0.5  # the longest of three may have waited for another process
    assert entry["rtfx"] == pytest.approx(sum(r["duration"] for r in rows) / entry["runtime_s"])
    assert entry["peak_memory_bytes"] > 1e7 and entry["threads"] == torch.get_num_threads()


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"experiment": "a"}')
    with pytest.raises(UserError, match="is not a result: recipe, technique"):
        Result.load(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Result.load(tmp_path / "b.json")


def test_a_runtime_is_the_median_of_transcribing_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs take 5, 1 and 2 s an utterance; loading the audio, 100 s each, does not count."""
    now, calls, speeds = [0.0], [], [9.0, 5.0, 1.0, 2.0]

    def transcribe(transcriber: object, rows: list, wavs: object, wav_lens: object) -> None:
        calls.append([row["id"] for row in rows])
        done = sum(map(len, calls))
        now[0] += len(rows) * speeds[0 if done <= 4 else 1 + (done - 5) // 5]

    def batches(rows: Rows, size: int) -> Iterator[tuple]:
        for start in range(0, len(rows), size):
            now[0] += 100.0
            yield list(rows[start : start + size]), torch.zeros(1), torch.ones(1)

    monkeypatch.setattr(runtime, "clock", lambda device: now[0])
    monkeypatch.setattr(runtime, "transcribe_rows", transcribe)
    monkeypatch.setattr(runtime, "iterate_batches", batches)
    rows = Rows.of([{"id": f"u{d}", "audio": "x", "duration": float(d)} for d in (3, 1, 5, 2, 4)])
    found = measure_runtime(SimpleNamespace(to=lambda device: None), rows, "cpu", 2, 3, lm=False)
    assert calls[0] == ["u2", "u3"] and calls[1] == ["u4", "u5"]  # the warm-up: the longest two batches
    assert calls[2:5] == [["u1", "u2"], ["u3", "u4"], ["u5"]]  # by duration
    assert (found["runtime_s"], found["runtime_min_s"], found["runtime_max_s"]) == (10.0, 5.0, 25.0)
    assert found["rtfx"] == 1.5 and found["repeats"] == 3
