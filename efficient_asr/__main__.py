"""`python -m efficient_asr COMMAND ...`: the console script."""

import sys

from efficient_asr.commands import main

if __name__ == "__main__":
    sys.exit(main())
