"""Write the model card of a model folder; the same as `efficient-asr model_card`."""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("model_card", sys.argv[1:]))
