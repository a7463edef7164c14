"""Run this project beside other programs: same weights, same audio, interleaved rounds, one scorer.

    python scripts/benchmark_peers.py WHISPER --manifest test.jsonl --language en --out results/peers/tiny.json
    python scripts/benchmark_peers.py WHISPER --manifest test.jsonl --models "audio context=FOLDER" --out peers.json

Every system is one process, loaded and warmed up. Then all systems take turns (A B C A B C ...), so a machine that slows down
does so for all. Rows have the median of the rounds; `ratio_to_ours` is the time of ours (plain) divided by the system's, in the
same round. Systems whose packages are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from efficient_asr.commands.peers import OTHER_MODELS, SYSTEMS
from efficient_asr.data import load_row, read_manifest
from efficient_asr.evaluation.comparison import manifest_names
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name, peak_memory_bytes, reset_peak_memory
from efficient_asr.evaluation.wer import count_errors
from efficient_asr.models.backends import CACHE
from efficient_asr.reporting.tables import show
from efficient_asr.settings.options import at_least
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

PLAIN = "ours"  # its times are those that ratios refer to


def read_audio(args: argparse.Namespace) -> tuple[list[torch.Tensor], list[str]]:
    """Return recordings, sorted by length, and their texts."""
    rows = [row for path in args.manifest for row in list(read_manifest(path))[: args.utterances]]
    rows = sorted((row for row in rows if row["duration"] < 29.5), key=lambda row: row["duration"])
    return [load_row(row) for row in rows], [row["text"] for row in rows]


def system(label: str, args: argparse.Namespace) -> tuple[str, str, str, Any]:
    """Return system, backend, precision and `(language, batch_size, work) -> recognise` of a label."""
    for name, folder in args.models:  # of another model, in the forms of this project
        for suffix, (_, *about, function) in OTHER_MODELS.items():
            if label == f"ours, {name}{suffix}":
                return "efficient_asr", *about, functools.partial(function, folder)
    *about, function = SYSTEMS[label]
    return *about, functools.partial(function, args.model)


def work(args: argparse.Namespace) -> None:
    """Serve one system: load it, then answer each line of standard input with the time and the texts of one round."""
    answer, sys.stdout = sys.stdout, sys.stderr
    os.environ.setdefault(CACHE, str(args.work))
    wavs, _ = read_audio(args)
    try:
        recognise = system(args.serve, args)[3](args.language, args.batch_size, args.work)
        recognise(wavs[: 2 * args.batch_size])
        reset_peak_memory("cpu")  # not that of a conversion
    except (ImportError, UserError) as error:
        print(json.dumps({"missing": str(error)}), file=answer, flush=True)
        return
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        texts = recognise(wavs)
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "texts": texts, "peak_memory_bytes": peak_memory_bytes("cpu")}
        print(json.dumps(found), file=answer, flush=True)


class Worker:
    """A system in its own process."""

    def __init__(self, label: str, batch_size: int, argv: list[str], threads: int) -> None:
        self.label, self.batch_size = label, batch_size
        self.rounds: list[dict[str, Any]] = []
        self.errors = tempfile.TemporaryFile()  # not a pipe, which would fill up
        command = [sys.executable, __file__, *argv, "--serve", label, "--batch_size", str(batch_size)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        atexit.register(self.process.kill)
        self.missing = self._read().get("missing")

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            reason = self.errors.read().decode(errors="replace")[-2000:]
            raise UserError(f"{self.label} stopped:\n{reason}")
        return json.loads(line)

    def run(self) -> None:
        """Run one round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())


def rows_of(workers: list[Worker], args: argparse.Namespace, texts: list[str], audio_s: float) -> list[dict[str, Any]]:
    """Return the rows of the result for systems of one batch size."""
    plain = next((worker.rounds for worker in workers if worker.label == PLAIN), None)
    normalise = get_normaliser(whisper_normaliser([args.language]))
    rows = []
    for worker in workers:
        seconds = [one["seconds"] for one in worker.rounds]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(plain or (), worker.rounds, strict=plain is not None)]
        pairs = [
            (normalise(a, args.language), normalise(b, args.language))
            for a, b in zip(texts, worker.rounds[0]["texts"], strict=True)
        ]
        errors = sum(found.total for found in count_errors([a for a, _ in pairs], [b for _, b in pairs]))
        name, backend, precision, function = system(worker.label, args)
        model = function.args[0]
        rows.append(
            {
                "label": worker.label, "system": name, "model": Path(model).name, "backend": backend,
                "precision": precision, "batch_size": worker.batch_size,
                "audio": manifest_names(args.manifest), "utterances": len(texts), "audio_s": audio_s,
                "wer_percent": 100 * errors / sum(len(a.split()) for a, _ in pairs),
                "rtfx": audio_s / statistics.median(seconds), "rounds": len(seconds), "seconds": seconds,
                "peak_memory_bytes": max(one["peak_memory_bytes"] for one in worker.rounds),
                "ratio_to_ours": statistics.median(ratios) if ratios else None, "hypotheses": worker.rounds[0]["texts"],
            }
        )  # fmt: skip
    return rows


def compare(args: argparse.Namespace, argv: list[str]) -> None:
    """Run all systems and write the result."""
    wavs, texts = read_audio(args)
    audio_s = sum(len(wav) for wav in wavs) / 16000
    rows, missing = [], {}
    for batch_size in args.batch_sizes:
        workers = []
        others = [f"ours, {name}{suffix}" for name, _ in args.models for suffix in OTHER_MODELS]
        for label in (*args.systems, *others):
            worker = Worker(label, batch_size, argv, args.threads)
            print(f"batch {batch_size}: {label}: {worker.missing or 'ready'}", file=sys.stderr)
            if worker.missing:
                missing[f"{label}, batch {batch_size}"] = worker.missing
            else:
                workers.append(worker)
        for number in range(args.rounds):
            for worker in workers:
                worker.run()
                took = worker.rounds[-1]["seconds"]
                print(f"round {number + 1} of {args.rounds}: {worker.label}: {took:.1f} s", file=sys.stderr)
        for worker in workers:
            worker.process.communicate()
        rows += rows_of(workers, args, texts, audio_s)
        about = provenance(None) | {"cpu": device_name("cpu"), "threads": args.threads}
        result = {"format": "efficient_asr peers 1", "rows": rows, "missing": missing, "provenance": about}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(
            f"{row['label']:36} batch {row['batch_size']}  WER {row['wer_percent']:5.2f} %  rtfx {row['rtfx']:6.1f}  "
            f"x{show(row['ratio_to_ours'])}  {row['peak_memory_bytes'] / 2**20:.0f} MB"
        )
    print(f"result: {args.out}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory in Hugging Face's layout")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON lines: id, audio, duration, text")
    parser.add_argument("--language", default="en", help="language of the audio")
    parser.add_argument("--utterances", type=at_least(1), help="of each manifest, the first ones (default: all)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds that are timed")
    parser.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=at_least(1), default=os.cpu_count())
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument(
        "--models", type=lambda text: tuple(text.split("=", 1)), nargs="+", default=[],
        help="NAME=FOLDER: other models, such as trained ones, to run in forms of this project",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("data/peers"), help="folder for converted models")
    parser.add_argument("--out", type=Path, default=Path("peers.json"), help="file for the result")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=at_least(1), default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.serve:
        work(args)
        return
    check_writable(args.out.parent, "--out")
    if any(len(pair) != 2 or not Path(pair[1]).is_dir() for pair in args.models):
        raise UserError("--models: give NAME=FOLDER, with a folder that is there")
    compare(args, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
