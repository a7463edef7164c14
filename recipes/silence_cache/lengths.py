"""Time to the transcript against the length of the audio: the padded Whisper and faster forms of it, at batch 1.

    python recipes/silence_cache/lengths.py WHISPER --manifest a.jsonl --out results/silence_cache/lengths-tiny.json
    python recipes/silence_cache/lengths.py WHISPER --manifest a.jsonl --forms padded --paddings_s 0 0.2 1 2 5 --lengths_s 5 \\
        --out results/silence_cache/paddings-tiny.json

Recordings are cut to each length, from audio in memory to text. All forms take turns in every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import SAMPLE_RATE, load_row, read_manifest
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.settings.options import at_least
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

CACHED = {"encoder_padding": "silence_cache"}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"encoder_padding": 30.0}, "cache": CACHED, "cache, int8 decoder": CACHED | {"quantise": "decoder-int8"},
    "cache, int8 decoder, onnx": CACHED | {"quantise": "decoder-int8", "backend": "onnx"},
}  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory or hub id")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines: id, audio, text")
    parser.add_argument("--lengths_s", type=float, nargs="+", default=[1, 3, 5, 10, 20], help="lengths in seconds")
    parser.add_argument("--utterances", type=at_least(1), default=4, help="recordings, the longest ones")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds that are timed")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument(
        "--paddings_s", type=float, nargs="+", default=[], help="also the cache with so much real silence"
    )
    parser.add_argument("--language", default="en", help="language of the audio")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    if min(args.lengths_s) <= 0:
        raise UserError(f"--lengths_s: lengths must be greater than 0, got {min(args.lengths_s):g}")
    longest = sorted(read_manifest(args.manifest), key=lambda row: -row["duration"])[: args.utterances]
    wavs = [load_row(row) for row in longest]
    lengths_s = [each for each in args.lengths_s if each * SAMPLE_RATE <= min(len(wav) for wav in wavs)]
    if not lengths_s:
        raise UserError(f"--lengths_s: the recordings have {len(wavs[-1]) / SAMPLE_RATE:.1f} s only")
    forms = {name: FORMS[name] for name in args.forms}
    forms |= {f"cache, {padding_s:g} s": CACHED | {"padding_s": padding_s} for padding_s in args.paddings_s}
    source = model_source(args.model)
    loaded = {name: WhisperTranscriber.from_source(source, args.language, **own) for name, own in forms.items()}
    rows = []
    for length_s in tqdm(lengths_s, unit="length"):
        pieces = [wav[None, : round(length_s * SAMPLE_RATE)] for wav in wavs]
        times: dict[str, list[float]] = {name: [] for name in loaded}
        for number in range(args.rounds + 1):
            for name, transcriber in loaded.items():
                start = time.perf_counter()
                for piece in pieces:
                    transcriber.transcribe(piece)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - start) / len(pieces))
        medians = {name: statistics.median(each) for name, each in times.items()}
        rows.append({"audio_s": length_s, "seconds": medians, "rounds": times})
    about = provenance(None) | {"cpu": device_name("cpu"), "threads": torch.get_num_threads()}
    result = {"utterances": len(wavs), "rounds": args.rounds, "rows": rows, "provenance": about}
    atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
