"""Evaluate a model on a manifest; the same as `efficient-asr evaluate`."""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:]))
