"""What the silence cache costs and saves: WER against the padded model, with paired intervals, and time.

    python recipes/silence_cache/compare.py WHISPER --manifest a.jsonl b.jsonl --out results/silence_cache/tiny.json
    python recipes/silence_cache/compare.py WHISPER --manifest a.jsonl --models audio_context=FOLDER --out out.json

Each variant decodes all utterances once, greedily, in their own language. A variant that is in the output already is not run
again. Times are those of single runs, one after the other; for times to be compared, use scripts/benchmark_peers.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import iterate_batches, load_row, read_manifest
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.wer import count_errors, error_rate_percent, paired_bootstrap
from efficient_asr.inference.transcriber import MANIFEST, transcribe_rows
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.sources import fingerprint
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.silence_cache.cache import SilenceCache
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

BATCH = 8
VARIANTS = {  # name -> real padding in seconds, group, whether calibrated on recordings
    "0.2 s, groups of 4": (0.2, 4, False), "0.2 s, groups of 4, recordings": (0.2, 4, True),
    "0.2 s, no groups, recordings": (0.2, 1, True), "0.2 s, groups of 10, recordings": (0.2, 10, True),
    "0 s, groups of 4, recordings": (0.0, 4, True), "1 s, groups of 4, recordings": (1.0, 4, True),
    "2 s, groups of 4, recordings": (2.0, 4, True), "5 s, groups of 4, recordings": (5.0, 4, True),
}  # fmt: skip
CACHED = {"encoder_padding": "silence_cache"}  # 0.2 s, groups of 4
OPTIONS: dict[str, dict[str, Any]] = {
    "int8 decoder": {"quantise": "decoder-int8"}, "cache, int8 decoder": CACHED | {"quantise": "decoder-int8"},
    "cache, int8": CACHED | {"quantise": "int8"},
    "cache, int8 decoder, onnx": CACHED | {"quantise": "decoder-int8", "backend": "onnx"},
    "cache, int8, ctranslate2": CACHED | {"quantise": "int8", "backend": "ctranslate2"},
}  # fmt: skip


def build(name: str, args: argparse.Namespace, recordings: list[Any]) -> WhisperTranscriber:
    """Return the transcriber of a variant, or of another model."""
    common: dict[str, Any] = {"language": MANIFEST, "max_tokens_per_s": 8.0}
    if name in args.models:
        return WhisperTranscriber.from_source(args.models[name], **common)
    options = OPTIONS.get(name, {"encoder_padding": 30.0})
    transcriber = WhisperTranscriber.from_source(args.model, **common, **options)
    if name in VARIANTS:
        padding_s, group, needs_recordings = VARIANTS[name]
        wavs = recordings if needs_recordings else None
        transcriber.model.encoder_padding = SilenceCache.calibrate(transcriber.model, wavs, padding_s, group)
    return transcriber.prepare()


def named(text: str) -> tuple[str, str]:
    """Return name and folder of `NAME=FOLDER`."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def transcripts(transcriber: WhisperTranscriber, rows: list[dict[str, Any]], name: str) -> list[str]:
    """Return the texts of all utterances, which are sorted by length."""
    texts = []
    with tqdm(total=len(rows), desc=name, unit="utt", mininterval=5) as progress:
        for batch, wavs, wav_lens in iterate_batches(rows, BATCH):
            texts += [found.text for found in transcribe_rows(transcriber, batch, wavs, wav_lens)]
            progress.update(len(batch))
    return texts


def describe(rows: list[dict[str, Any]], texts: list[str], plain: list[str]) -> dict[str, Any]:
    """Return WER, and the difference from the padded model's, of texts."""
    found: dict[str, Any] = {}
    for corpus in ("all", *dict.fromkeys(row["corpus"] for row in rows)):
        own = [i for i, row in enumerate(rows) if corpus in ("all", row["corpus"])]
        errors = []
        for hypotheses in (plain, texts):
            pairs = []
            for i in own:
                normalise = get_normaliser(whisper_normaliser([rows[i].get("language")]))
                pairs.append([normalise(text, rows[i].get("language")) for text in (rows[i]["text"], hypotheses[i])])
            errors.append(count_errors([a for a, _ in pairs], [b for _, b in pairs]))
        test = paired_bootstrap(*errors)
        found[corpus] = {
            "utterances": len(own), "words": sum(error.reference_length for error in errors[0]),
            "wer_percent": error_rate_percent(errors[1]), "identical": sum(plain[i] == texts[i] for i in own),
            "difference_percent": error_rate_percent(errors[1]) - error_rate_percent(errors[0]),
            "ci95_percent": [test["low_percent"], test["high_percent"]],
        }  # fmt: skip
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory or hub id")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON lines: id, audio, text, language")
    parser.add_argument("--calibration", type=Path, help="manifest of recordings for calibration (needs no texts)")
    parser.add_argument("--utterances", type=at_least(1), default=100, help="of each manifest, the first ones")
    choices = [*VARIANTS, *OPTIONS]
    parser.add_argument("--variants", nargs="*", choices=choices, default=list(VARIANTS), help="default: paddings")
    parser.add_argument("--models", type=named, nargs="+", default=[], help="NAME=FOLDER: other models to compare")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    args.models = dict(args.models)
    check_writable(args.out.parent, "--out")
    rows: list[dict[str, Any]] = []
    for path in args.manifest:
        rows += [row | {"corpus": path.parent.name} for row in list(read_manifest(path))[: args.utterances]]
    rows = sorted((row for row in rows if row["duration"] < 29.5), key=lambda row: row["duration"])
    key = {"model": fingerprint(args.model), "utterances": [row["id"] for row in rows], "batch_size": BATCH}
    result = json.loads(args.out.read_text()) if args.out.is_file() else {"key": key, "variants": {}}
    if result["key"] != key:
        raise UserError(f"--out: {args.out} is of another model or other utterances; choose another file")
    silent = [] if args.calibration is None else list(read_manifest(args.calibration, need_text=False))[:16]
    recordings = [load_row(row) for row in silent]
    for name in ("padded", *args.variants, *args.models):
        model = fingerprint(args.models[name]) if name in args.models else None
        if result["variants"].get(name, {}).get("model", model) != model:
            raise UserError(f"--models: {args.out} has results of another model as '{name}'; choose another name")
        if name in result["variants"] or (VARIANTS.get(name, (0, 0, False))[2] and not recordings):
            continue
        transcriber = build(name, args, recordings)
        start = time.perf_counter()
        texts = transcripts(transcriber, rows, name)
        seconds = time.perf_counter() - start
        plain = result["variants"]["padded"]["texts"] if name != "padded" else texts
        result["variants"][name] = describe(rows, texts, plain) | {"seconds": seconds, "texts": texts}
        if model is not None:
            result["variants"][name]["model"] = model
        result["provenance"] = provenance(None)
        atomic_write_text(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        about = result["variants"][name]["all"]
        low, high = about["ci95_percent"]
        difference = f"{about['difference_percent']:+.2f} [{low:+.2f}, {high:+.2f}]"
        same = f"{about['identical']} of {len(rows)} identical"
        print(f"{name:32} WER {about['wer_percent']:.2f} %, {difference}, {same}, {seconds:.0f} s")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
