"""Generate tables and plots from results; the same as `efficient-asr report`."""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("report", sys.argv[1:]))
