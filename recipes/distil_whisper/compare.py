"""Compare students with their teacher: WER, MACs, hallucinations, and time in interleaved rounds.

    python recipes/distil_whisper/compare.py --systems teacher=WHISPER student=output/distil_whisper/1986/model \\
        "student, fast=output/distil_whisper/1986/model;encoder_padding=silence_cache;quantise=decoder-int8" \\
        --manifest a.jsonl b.jsonl --language en --out results/distil_whisper/base.json

A system is NAME=MODEL, with options of `load_transcriber` behind semicolons. Every utterance is transcribed once, alone, for
the WER. MACs are counted on the first `--timed` utterances of each manifest, and these are timed at batch 1 and 8, one system
after the other, `--rounds` times; the table shows medians. Rerun the command to continue, also with further systems: what was
transcribed before is kept in `output/compare`. The times are always those of one run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr import load_transcriber
from efficient_asr.data import Row, Rows, iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import score
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name
from efficient_asr.evaluation.wer import compared, count_errors, repeated_ngrams
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint
from efficient_asr.settings.command_line import read_value
from efficient_asr.settings.options import at_least
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

BATCHES, PARTS = (1, 8), Path("output/compare")


def named(text: str) -> tuple[str, tuple[str, dict[str, Any]]]:
    """Return name, model and options of `NAME=MODEL;option=value;...`."""
    name, equals, rest = text.partition("=")
    model, *pairs = rest.split(";")
    if not (name and equals and model) or not all("=" in pair for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL or NAME=MODEL;option=value")
    return name, (model, {key: read_value(value) for key, _, value in (pair.partition("=") for pair in pairs)})


def errors_of(records: list[dict[str, Any]]) -> list[Any]:
    """Return the word errors of records."""
    return count_errors([r["reference"] for r in records], [r["hypothesis"] for r in records])


def describe(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Return WER and hallucinations of records, and the difference from the first system's WER."""
    errors = errors_of(records)
    words = sum(each.reference_length for each in errors)
    return {
        "utterances": len(records), "words": words, **compared(errors_of(reference), errors),
        "insertions_percent": 100 * sum(each.insertions for each in errors) / words,
        "repeated_5grams": sum(repeated_ngrams(record["hypothesis"]) for record in records),
    }  # fmt: skip


def mean_macs_g(transcriber: Transcriber, rows: list[Row]) -> float | None:
    """Return the GMACs of an utterance, transcribed alone; None for other engines than torch, or without utterances."""
    if not transcriber.counts_macs or not rows:
        return None
    batches = iterate_batches(Rows.of(rows), 1)
    return sum(count_macs(transcribe_rows, transcriber, *batch).macs for batch in batches) / 1e9 / len(rows)


def time_once(transcriber: Transcriber, rows: list[Row], batch_size: int) -> dict[str, float]:
    """Return seconds from audio in memory to text, and tokens per second of the decoder alone where that is known."""
    total = decoding = tokens = 0.0
    for chunk, wavs, wav_lens in iterate_batches(Rows.of(rows), batch_size):
        start = time.perf_counter()
        short = max(row["duration"] for row in chunk) < 29.5
        if short and transcriber.shows_encoder and transcriber.model.backend == "torch":
            languages = [row.get("language") for row in chunk] if transcriber.takes_languages else None
            encoded = transcriber.encode(wavs, wav_lens, languages=languages)
            middle = time.perf_counter()
            found = transcriber.decode(encoded, languages)
            decoding += time.perf_counter() - middle
            tokens += sum(each.details.get("tokens", 0) for each in found)
        else:
            transcribe_rows(transcriber, chunk, wavs, wav_lens)
        total += time.perf_counter() - start
    return {"seconds": total, "tokens_per_s": tokens / decoding if decoding else None}


def measure_times(systems: dict[str, Transcriber], rows: list[Row], rounds: int) -> dict[str, Any]:
    """Return medians over interleaved rounds, by system and batch size."""
    rows = sorted(rows, key=lambda row: row["duration"])
    found: dict[str, Any] = {name: {batch: [] for batch in BATCHES} for name in systems}
    for number in tqdm(range(rounds + 1), desc="timing rounds"):
        for name, transcriber in systems.items():
            for batch in BATCHES:
                once = time_once(transcriber, rows[:8] if number == 0 else rows, batch)  # the first one warms up
                found[name][batch] += [once] if number else []
    medians = {}
    for name, by_batch in found.items():
        medians[name] = {}
        for batch, times in by_batch.items():
            keys = [key for key in times[0] if times[0][key] is not None]
            medians[name][batch] = {key: statistics.median(each[key] for each in times) for key in keys}
    audio_s = sum(row["duration"] for row in rows)
    return {"audio_s": audio_s, "utterances": len(rows), "rounds": rounds, "systems": medians}


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--systems", type=named, nargs="+", required=True, help="NAME=MODEL;option=value; the teacher first"
    )
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON lines: id, audio, text, language")
    parser.add_argument("--language", help="language of the audio; detected if not given")
    parser.add_argument(
        "--timed", type=at_least(0), default=8, help="utterances of each manifest that are timed and counted"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds of timing")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    return parser.parse_args()


def corpus_names(benchmarks: list[Benchmark]) -> list[str]:
    """Return a name for each benchmark: that of its folder, and of its file where folders have the same name."""
    folders = [benchmark.corpus for benchmark in benchmarks]
    names = [b.corpus if folders.count(b.corpus) == 1 else f"{b.corpus}/{b.split}" for b in benchmarks]
    if len({*names, "all"}) <= len(names):
        raise UserError(f"--manifest: the names {', '.join(names)} are not distinct, or one is 'all'; rename a file")
    return names


def main() -> None:
    """Run the command."""
    args = read_arguments()
    check_writable(args.out.parent, "--out")
    benchmarks = [Benchmark.from_manifest(path, normaliser=None, language=args.language) for path in args.manifest]
    names, result, transcribers, first = corpus_names(benchmarks), {"systems": {}}, {}, None
    timed = [row for benchmark in benchmarks for row in benchmark.rows[: args.timed]]
    for name, (model, options) in dict(args.systems).items():
        source = model_source(model)
        transcribers[name] = load_transcriber(source, **{"language": args.language} | options)
        about = f"{fingerprint(source)} {options} {args.language}"
        stem = PARTS / hashlib.sha256(about.encode()).hexdigest()[:16]
        own = [
            list(score(transcribers[name], benchmark, None, False, Path(f"{stem}-{benchmark.hash}"), about, "cpu"))
            for benchmark in benchmarks
        ]
        first = first or own
        pairs = [([*chain(*own)], [*chain(*first)]), *zip(own, first, strict=True)]
        result["systems"][name] = {
            "model": fingerprint(source), "options": options, "parameters": transcribers[name].parameters_count(),
            "macs_g": mean_macs_g(transcribers[name], timed),
            "corpora": {corpus: describe(*pair) for corpus, pair in zip(("all", *names), pairs, strict=True)},
        }  # fmt: skip
        every = result["systems"][name]["corpora"]["all"]
        print(f"{name}: WER {every['wer_percent']:.2f} % ({every['difference_percent']:+.2f})", flush=True)
    if timed:
        times = {"threads": torch.get_num_threads(), "cpu": device_name("cpu")}
        result["timing"] = measure_times(transcribers, timed, args.rounds) | times
    result["provenance"] = provenance(None)
    atomic_write_text(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
