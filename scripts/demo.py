"""Web page for models; the same as `efficient-asr app`.

python scripts/demo.py MODEL [MODEL ...] --port 7860
"""

import sys

from efficient_asr.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("app", sys.argv[1:]))
