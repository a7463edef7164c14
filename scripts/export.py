"""Convert a trained model for other programs; the same as `efficient-asr export`."""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("export", sys.argv[1:]))
