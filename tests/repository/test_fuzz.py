"""Thousands of mutated manifests and audio files: no traceback, no hang, and no good row lost."""

from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import chirp

from efficient_asr.corpora import jsonl
from efficient_asr.data import load_audio, read_manifest
from efficient_asr.data.audio import inspect_audio
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.utils.errors import UserError

MANIFESTS, AUDIO_FILES = 2000, 1500


@contextmanager
def no_hang(seconds: int = 60) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


NASTY = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), "", " ", "\0", "a\0b", "\ud800", "ü" * 300, "../../../etc/passwd",
    [], {}, [1], {"a": 1}, "/dev/zero", ".", "~", 10**400, -0.0, "\u2028", "x" * 5000, "%s%n", "https://x/y.wav", "u0.wav\n",
]  # fmt: skip


def mutate_bytes(line: bytes, rng: random.Random) -> bytes:
    data = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif kind == 3:
            data[at:at] = rng.choice(
                [b"[" * 3000, b"{" * 50, b"9" * 5000, b'"', b"\\u12", b"\xef\xbb\xbf", b"null", b"\r", b"\n"]
            )
        else:
            data[at:at] = data[:at]
    return bytes(data)


def mutate_row(row: dict, rng: random.Random) -> bytes:
    row = dict(row)
    for _ in range(rng.randint(1, 2)):
        key = rng.choice([*row, "duration", "text", "new"])
        if rng.random() < 0.3:
            row.pop(key, None)
        else:
            row[key] = rng.choice(NASTY)
    return json.dumps(row).encode()


def test_mutated_manifests(corpus: Path, tmp_path: Path) -> None:
    """The lines that were left alone must come through, whatever stands around them."""
    rng = random.Random(1986)
    good = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    path, refused, survivors = corpus / "mutated.jsonl", 0, 0
    for case in range(MANIFESTS):
        lines, untouched = [], []
        for i, row in enumerate(good):
            row = {**row, "id": f"case{case}-{i}"}
            if rng.random() < 0.4:
                row["id"] = f"mutated{case}-{i}"
                line = mutate_row(row, rng) if rng.random() < 0.5 else mutate_bytes(json.dumps(row).encode(), rng)
                lines.append(line)
            else:
                untouched.append(row["id"])
                lines.append(json.dumps(row).encode())
        path.write_bytes(b"\n".join(lines) + b"\n")
        with no_hang():
            try:
                rows = list(read_manifest(path, skip_bad=True, skipped_file=tmp_path / "skipped.jsonl"))
            except UserError as error:
                assert "holds no usable utterance" in str(error) and not untouched
                continue
            found = {row["id"] for row in rows}
            assert set(untouched) <= found, (case, lines)
            survivors += len(found - set(untouched))
            for row in rows:
                json.dumps(row, ensure_ascii=False).encode()  # what was accepted can be written again
                assert row["duration"] > 0 and row["text"].strip()
            out = jsonl.prepare(str(corpus), tmp_path / "out", {"x": path.name})["x"]
            assert {row["id"] for row in read_manifest(out, skip_bad=True)} == found
            try:
                read_manifest(path)
            except UserError as error:
                refused += 1
                assert "line" in str(error)
    assert refused > MANIFESTS / 2 and survivors > MANIFESTS / 10  # the mutations were neither harmless nor all fatal


def recordings() -> dict[str, bytes]:
    """One second of sound in several formats."""
    wav, kinds = chirp(1.0, 200, 900), {}
    for kind, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
    ):
        memory = io.BytesIO()
        soundfile.write(memory, np.stack([wav, wav], axis=1) if kind == "AU" else wav, 16000, subtype, format=kind)
        kinds[f"{kind.lower()}-{subtype}"] = memory.getvalue()
    return kinds


class Counter(Transcriber):
    """Says how long the audio is: a transcriber that needs no model."""

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        assert wavs.isfinite().all()
        return [Transcript(f"{int(length * wavs.shape[1])} samples") for length in wav_lens]


def test_mutated_audio_through_reading_and_evaluation(tmp_path: Path) -> None:
    rng, sources = random.Random(1986), recordings()
    rows, readable, damaged = [], set(), 0
    for case in range(AUDIO_FILES):
        kind = rng.choice(list(sources))
        data = bytearray(sources[kind])
        for _ in range(rng.randint(0, 3)):
            how, at = (
                rng.randrange(4),
                rng.randrange(len(data)) if rng.random() < 0.4 else rng.randrange(min(120, len(data))),
            )
            if how == 0:
                data[at] = rng.randrange(256)
            elif how == 1:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xc0\x7f"])
            elif how == 2:
                del data[rng.randrange(len(data)) :]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 50))
            data = data or bytearray(b"x")
        path = tmp_path / f"{case}.{kind.split('-')[0]}"
        path.write_bytes(data)
        with no_hang():
            report = inspect_audio(str(path), samples=True)
            try:
                wav = load_audio(path)
                assert report.problem is None, (report, kind)
                assert wav.dim() == 1 and len(wav) and wav.isfinite().all()
                readable.add(str(case))
            except UserError as error:
                assert str(error) == report.problem  # both ways of reading tell the same
                damaged += 1
        rows.append({"id": str(case), "audio": path.name, "text": "some words"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with no_hang(60):
        benchmark = Benchmark.from_manifest(
            tmp_path / "test.jsonl", skip_bad=True, check_audio="samples", skipped_file=tmp_path / "skipped.jsonl"
        )
        result = evaluate(Counter(), benchmark, measure_macs=False, repeats=0)
    assert {row["id"] for row in result.rows} == readable
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == damaged
    assert damaged > AUDIO_FILES / 5 and len(readable) > AUDIO_FILES / 5
