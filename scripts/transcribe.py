"""Transcribe audio files; the same as `efficient-asr transcribe`."""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("transcribe", sys.argv[1:]))
