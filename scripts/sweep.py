"""Moved to recipes/early_exit/sweep.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

NEW = Path(__file__).parents[1] / "recipes/early_exit/sweep.py"
print("warning: scripts/sweep.py has moved to recipes/early_exit/sweep.py", file=sys.stderr)
sys.argv[0] = str(NEW)
runpy.run_path(str(NEW), run_name="__main__")
