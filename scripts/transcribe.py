"""Transcribe audio files; print one JSON line per file.

    python scripts/transcribe.py MODEL a.wav b.flac

    python scripts/transcribe.py WHISPER lecture.m4a --language en --timestamps
    python scripts/transcribe.py CTC_MODEL a.wav --lm 4gram.arpa --lm_case upper

MODEL is the model folder written by a recipe, or a Whisper directory or hub id. Audio can have any length. Each line contains
`audio`, `text` and details of the technique. Files that cannot be read are reported on standard error; the others are still
transcribed.
"""

from __future__ import annotations

import argparse
import sys

import torch

from efficient_asr import load_transcriber
from efficient_asr.data import inspect_audio, load_audio, silence
from efficient_asr.data.audio import SILENT_PEAK
from efficient_asr.settings.options import add_lm_options, add_whisper_options, lm_options, whisper_options
from efficient_asr.utils.errors import UserError, exit_code, print_json


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "audio", nargs="+", metavar="AUDIO", help="any format that libsndfile or FFmpeg can read, at any sample rate"
    )
    add_lm_options(parser)
    add_whisper_options(parser)
    args = parser.parse_args()
    if args.language == "manifest":
        raise UserError("--language manifest: audio files have no manifest; give the language, or omit --language")
    transcriber = load_transcriber(args.model, **whisper_options(args), **lm_options(args))
    transcriber.to("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for path in args.audio:
        try:
            wav = load_audio(path)
            report = inspect_audio(path, samples=True) if float(wav.abs().max()) < SILENT_PEAK else None
            if report is not None:
                print(f"warning: {silence(path, report.cancelled)}", file=sys.stderr)
            transcript = transcriber.transcribe(wav[None], torch.ones(1))[0]
        except UserError as error:
            failed += 1
            print(f"error: {path}: {error}", file=sys.stderr)
            continue
        print_json({"audio": path, "text": transcript.text, **transcript.details})
    if failed:
        raise UserError(f"{failed} of {len(args.audio)} files could not be transcribed")


if __name__ == "__main__":
    sys.exit(exit_code(main))
