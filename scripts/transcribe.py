"""Transcribe audio files; prints one JSON line a file.

    python scripts/transcribe.py MODEL a.wav b.flac

    python scripts/transcribe.py WHISPER lecture.flac --language en --long_audio pauses

MODEL is the folder that a recipe leaves behind, or a Whisper directory or hub id. Audio of any length. A line holds
`audio`, `text`, and what the technique did. A file that cannot be read is named on standard error; the others are still
transcribed.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from efficient_asr import load_transcriber
from efficient_asr.data import load_audio
from efficient_asr.errors import UserError, exit_code
from efficient_asr.settings import add_whisper_options, whisper_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="any format that libsndfile reads, any rate")
    parser.add_argument("--lm", help="ARPA or kenlm binary, for CTC models")
    add_whisper_options(parser)
    args = parser.parse_args()
    if args.language == "manifest":
        raise UserError(
            "--language manifest: these are audio files, without a manifest; name the language or leave it out"
        )
    transcriber = load_transcriber(args.model, lm_path=args.lm, **whisper_options(args))
    transcriber.to("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for path in args.audio:
        try:
            wav = load_audio(path)
            if not len(wav):
                raise UserError(f"{path} holds no samples")
            transcript = transcriber.transcribe(wav[None], torch.ones(1))[0]
        except UserError as error:
            failed += 1
            print(f"error: {path}: {error}", file=sys.stderr)
            continue
        print(
            json.dumps({"audio": path, "text": transcript.text, **transcript.details}, ensure_ascii=False), flush=True
        )
    if failed:
        raise UserError(f"{failed} of {len(args.audio)} files could not be transcribed")


if __name__ == "__main__":
    sys.exit(exit_code(main))
