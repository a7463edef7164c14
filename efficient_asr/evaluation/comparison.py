"""Compare models on the same recordings: WER against the first one, MACs, and times in interleaved rounds.

Times of different days, or even of different minutes, differ by more than most techniques save. Here one system is timed
after the other, again and again (A B C A B C), and medians are reported.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Row, Rows, audio_digest, iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import score
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name
from efficient_asr.evaluation.wer import compared, count_errors, repeated_ngrams
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint, with_contents
from efficient_asr.text.normalise import get_normaliser
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.locks import FolderLock

COMPUTES = "data evaluation inference models techniques text utils".split()  # subpackages that transcripts depend on
BATCHES, PARTS = (1, 8), Path("output/compare")


def code_digest() -> str:
    """Return a checksum of the code that transcripts may depend on."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for name in COMPUTES for path in (package / name).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
        short = max(row["duration"] for row in chunk) < (transcriber.window_s or 30.0) - 0.5
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


def manifest_names(paths: list[Path]) -> list[str]:
    """Return a name for each manifest; see `corpus_names`."""
    return corpus_names([(path.absolute().parent.name, path.stem) for path in paths])


def corpus_names(places: list[tuple[str, str]]) -> list[str]:
    """Return a name for each corpus and split: the split or, if this says nothing, the corpus; both if names are the same."""
    short = [corpus if split in ("manifest", "test", "dev", "train") else split for corpus, split in places]
    names = [
        name if short.count(name) == 1 else f"{corpus}/{split}"
        for name, (corpus, split) in zip(short, places, strict=True)
    ]
    if len({*names, "all"}) <= len(names):
        raise UserError(f"--manifest: the names {', '.join(names)} are not distinct, or one is 'all'; rename a file")
    return names


def compare(
    systems: dict[str, tuple[str, dict[str, Any]]],
    benchmarks: list[Benchmark],
    language: str | None,
    timed: int,
    rounds: int,
) -> dict[str, Any]:
    """Compare models; the transcripts of an earlier comparison are used again, its times are not.

    Arguments
    ---------
    systems : dict of str to tuple
        Name -> model and options of `load_transcriber`; the others are compared with the first one.
    benchmarks : list of Benchmark
        Test data.
    language : str or None
        Language of the audio.
    timed : int
        Utterances of each benchmark that are timed, and whose MACs are counted; 0 for none.
    rounds : int
        Rounds of timing.

    Returns
    -------
    dict
        Content of the file that `efficient-asr compare` writes.
    """
    names = corpus_names([(each.corpus, each.split) for each in benchmarks])
    result, transcribers, first = {"systems": {}}, {}, None
    for corpus, benchmark in zip(names, benchmarks, strict=True):
        if not any(
            get_normaliser(benchmark.normaliser)(row["text"], row.get("language") or "en") for row in benchmark.rows
        ):
            raise UserError(f"--manifest: no word is left in the texts of {corpus}; a WER needs some")
    parts = [f"{benchmark.hash}-{audio_digest(benchmark.rows)[:16]}" for benchmark in benchmarks]
    rows = [row for benchmark in benchmarks for row in benchmark.rows[:timed]]
    made_by = f"{code_digest()} {provenance(None)['versions']}"  # transcripts of an earlier comparison are kept
    for name, (model, options) in systems.items():
        source = model_source(model)
        transcribers[name] = load_transcriber(source, **{"language": language} | options)
        about = f"{fingerprint(source)} {with_contents(options)} {language} {transcribers[name].settings} {made_by}"
        stem = PARTS / hashlib.sha256(about.encode()).hexdigest()[:16]
        with FolderLock(Path(f"{stem}.lock"), wait=True):  # another comparison may have the same system
            own = [
                list(score(transcribers[name], benchmark, None, False, Path(f"{stem}-{part}"), about, "cpu"))
                for benchmark, part in zip(benchmarks, parts, strict=True)
            ]
        first = first or own
        pairs = [([*chain(*own)], [*chain(*first)]), *zip(own, first, strict=True)]
        result["systems"][name] = {
            "model": fingerprint(source), "options": options, "parameters": transcribers[name].parameters_count(),
            "macs_g": mean_macs_g(transcribers[name], rows), "details": transcribers[name].summary(chain(*own)),
            "corpora": {corpus: describe(*pair) for corpus, pair in zip(("all", *names), pairs, strict=True)},
        }  # fmt: skip
        every = result["systems"][name]["corpora"]["all"]
        print(f"{name}: WER {every['wer_percent']:.2f} % ({every['difference_percent']:+.2f})", flush=True)
    if rows:
        times = {"threads": torch.get_num_threads(), "cpu": device_name("cpu")}
        result["timing"] = measure_times(transcribers, rows, rounds) | times
    result |= {"language": language, "benchmarks": {n: b.hash for n, b in zip(names, benchmarks, strict=True)}}
    synthetic = all(row.get("synthetic", False) for benchmark in benchmarks for row in benchmark.rows)
    result["synthetic"] = synthetic
    return result | {"normalisers": sorted({each.normaliser for each in benchmarks}), "provenance": provenance(None)}
