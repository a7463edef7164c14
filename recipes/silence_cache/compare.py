"""What the silence cache costs and saves: WER against the padded model, with paired intervals, and time.

    python recipes/silence_cache/compare.py WHISPER --manifest a.jsonl b.jsonl --out results/silence_cache/tiny.json
    python recipes/silence_cache/compare.py WHISPER --manifest a.jsonl --models audio_context=FOLDER --out out.json
    python recipes/silence_cache/compare.py WHISPER --manifest calls.jsonl --long --variants "cache, int8 decoder" --out out.json

Each variant decodes all utterances once, greedily, in their own language. A variant that is in the output already is not run
again. Times are those of single runs, one after the other; for times to be compared, use scripts/benchmark_peers.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import iterate_batches, load_row, read_manifest
from efficient_asr.evaluation.comparison import manifest_names
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.wer import compared, count_errors
from efficient_asr.inference.long_audio import LongAudio
from efficient_asr.inference.transcriber import MANIFEST, Transcriber, transcribe_rows
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint
from efficient_asr.reporting.tables import show_difference
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.silence_cache.cache import SilenceCache
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

BATCH = 8
VARIANTS = {  # name -> real padding in seconds, group, positions in no group, whether calibrated on recordings
    "0.2 s, groups of 16 but for 64": (0.2, 16, 64, False),  # the default
    "0.2 s, groups of 16 but for 64, recordings": (0.2, 16, 64, True),
    "0.2 s, groups of 8 but for 64": (0.2, 8, 64, False), "0.2 s, groups of 8 but for 32": (0.2, 8, 32, False),
    "0.2 s, groups of 16 but for 128": (0.2, 16, 128, False), "0.2 s, groups of 4 but for 64": (0.2, 4, 64, False),
    "0.2 s, groups of 4": (0.2, 4, 0, False), "0.2 s, groups of 4, recordings": (0.2, 4, 0, True),
    "0.2 s, no groups": (0.2, 1, 0, False), "0.2 s, no groups, recordings": (0.2, 1, 0, True),
    "0.2 s, groups of 2": (0.2, 2, 0, False), "0.2 s, groups of 2, recordings": (0.2, 2, 0, True),
    "0.2 s, groups of 10, recordings": (0.2, 10, 0, True), "0 s, groups of 4, recordings": (0.0, 4, 0, True),
    "1 s, groups of 4, recordings": (1.0, 4, 0, True), "2 s, groups of 4, recordings": (2.0, 4, 0, True),
    "5 s, groups of 4, recordings": (5.0, 4, 0, True),
}  # fmt: skip
ON_RECORDINGS = [name for name, (*_, needs_recordings) in VARIANTS.items() if needs_recordings]
CACHED = {"encoder_padding": "silence_cache"}  # the default
OPTIONS: dict[str, dict[str, Any]] = {
    "int8 decoder": {"quantise": "decoder-int8"}, "cache, int8 decoder": CACHED | {"quantise": "decoder-int8"},
    "cache, int8": CACHED | {"quantise": "int8"},
    "cache, int8 decoder, onnx": CACHED | {"quantise": "decoder-int8", "backend": "onnx"},
    "cache, int8, ctranslate2": CACHED | {"quantise": "int8", "backend": "ctranslate2"},
}  # fmt: skip


def build(name: str, args: argparse.Namespace, recordings: list[Any]) -> Transcriber:
    """Return the transcriber of a variant, or of another model."""
    common: dict[str, Any] = {"language": MANIFEST, "max_tokens_per_s": 8.0}
    if name in args.models:
        return _for_audio(WhisperTranscriber.from_source(args.models[name], **common), args)
    options = OPTIONS.get(name, {"encoder_padding": 30.0})
    transcriber = WhisperTranscriber.from_source(args.model, **common, **options)
    if name in VARIANTS:
        padding_s, group, sinks, needs_recordings = VARIANTS[name]
        wavs = recordings if needs_recordings else None
        transcriber.model.encoder_padding = SilenceCache.calibrate(
            transcriber.model, wavs, padding_s, group, sinks=sinks
        )
    return _for_audio(transcriber.prepare(), args)


def _for_audio(transcriber: WhisperTranscriber, args: argparse.Namespace) -> Transcriber:
    return LongAudio(transcriber, "pauses") if args.long else transcriber


def named(text: str) -> tuple[str, str]:
    """Return name and folder of `NAME=FOLDER`."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def transcripts(
    transcriber: Transcriber, rows: list[dict[str, Any]], name: str, batch_size: int
) -> tuple[list[str], dict[str, Any]]:
    """Return the texts of all utterances, which are sorted by length, and the summary of what was done."""
    found = []
    with tqdm(total=len(rows), desc=name, unit="utt", mininterval=5) as progress:
        for batch, wavs, wav_lens in iterate_batches(rows, batch_size):
            found += transcribe_rows(transcriber, batch, wavs, wav_lens)
            progress.update(len(batch))
    return [one.text for one in found], transcriber.summary([one.details for one in found])


def digit_by_digit(reference: str, hypothesis: str) -> tuple[str, str]:
    """Separate the digits of both texts if the reference has nothing else: the normaliser joins spoken digits to one number."""
    if not re.fullmatch(r"[\d ]+", reference):
        return reference, hypothesis
    return " ".join(reference.replace(" ", "")), re.sub(r"(?<=\d)\s*(?=\d)", " ", hypothesis)


def describe(rows: list[dict[str, Any]], texts: list[str], plain: list[str]) -> dict[str, Any]:
    """Return WER, and the difference from the padded model's, of texts."""
    found: dict[str, Any] = {}
    for corpus in ("all", *dict.fromkeys(row["corpus"] for row in rows)):
        own = [i for i, row in enumerate(rows) if corpus in ("all", row["corpus"])]
        errors = []
        for hypotheses in (plain, texts):
            pairs = []
            for i in own:
                language = rows[i].get("language") or "en"
                normalise = get_normaliser(whisper_normaliser([language]))
                pairs.append(digit_by_digit(*(normalise(text, language) for text in (rows[i]["text"], hypotheses[i]))))
            errors.append(count_errors([a for a, _ in pairs], [b for _, b in pairs]))
        found[corpus] = {
            "utterances": len(own), "words": sum(error.reference_length for error in errors[0]),
            "identical": sum(plain[i] == texts[i] for i in own), **compared(*errors),
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
    parser.add_argument("--long", action="store_true", help="recordings of 29.5 s or more, in pieces between pauses")
    parser.add_argument("--utterances", type=at_least(1), default=100, help="of each manifest, the first ones")
    choices = [*VARIANTS, *OPTIONS]
    parser.add_argument("--variants", nargs="*", choices=choices, default=list(VARIANTS), help="default: paddings")
    parser.add_argument("--models", type=named, nargs="+", default=[], help="NAME=FOLDER: other models to compare")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    args.model, args.models = model_source(args.model), {name: model_source(folder) for name, folder in args.models}
    check_writable(args.out.parent, "--out")
    rows: list[dict[str, Any]] = []
    for path, name in zip(args.manifest, manifest_names(args.manifest), strict=True):
        rows += [row | {"corpus": name} for row in list(read_manifest(path))[: args.utterances]]
    rows = sorted((row for row in rows if (row["duration"] >= 29.5) == args.long), key=lambda row: row["duration"])
    if not rows:
        raise UserError(f"--manifest: no utterance of {'at least' if args.long else 'less than'} 29.5 s")
    unheard = [name for name in args.variants if name in ON_RECORDINGS]
    if args.calibration is None and unheard and args.variants != list(VARIANTS):
        raise UserError(f"--variants: '{unheard[0]}' needs recordings; give --calibration")
    key = {"model": fingerprint(args.model), "utterances": [row["id"] for row in rows], "batch_size": BATCH}
    new = {"model": Path(args.model).name, "key": key, "variants": {}}
    result = json.loads(args.out.read_text()) if args.out.is_file() else new
    if result.get("key") != key:
        raise UserError(f"--out: {args.out} is of another model or other utterances; choose another file")
    silent = [] if args.calibration is None else list(read_manifest(args.calibration, need_text=False))[:16]
    recordings, heard = [load_row(row) for row in silent], [row["id"] for row in silent]
    for name in ("padded", *args.variants, *args.models):
        model = fingerprint(args.models[name]) if name in args.models else None
        if result["variants"].get(name, {}).get("model", model) != model:
            raise UserError(f"--models: {args.out} has results of another model as '{name}'; choose another name")
        if name in ON_RECORDINGS and result["variants"].get(name, {}).get("calibration", heard) != heard:
            raise UserError(f"--calibration: {args.out} has '{name}' with other recordings; choose another file")
        if name in result["variants"] or (name in ON_RECORDINGS and not recordings):
            continue
        transcriber = build(name, args, recordings)
        start = time.perf_counter()
        texts, summary = transcripts(transcriber, rows, name, 1 if args.long else BATCH)
        seconds = time.perf_counter() - start
        plain = result["variants"]["padded"]["texts"] if name != "padded" else texts
        about = {"seconds": seconds, "summary": summary, "texts": texts}
        about |= {"calibration": heard} if name in ON_RECORDINGS else {}
        result["variants"][name] = describe(rows, texts, plain) | about
        if model is not None:
            result["variants"][name]["model"] = model
        result["provenance"] = provenance(None)
        atomic_write_text(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        about = result["variants"][name]["all"]
        difference = show_difference(about, name == "padded")
        same = f"{about['identical']} of {len(rows)} identical"
        print(f"{name:32} WER {about['wer_percent']:.2f} %, {difference}, {same}, {seconds:.0f} s")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
