"""Moved to recipes/decider/compare.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

NEW = Path(__file__).parents[1] / "recipes/decider/compare.py"
print("warning: scripts/compare_routers.py has moved to recipes/decider/compare.py", file=sys.stderr)
sys.argv[0] = str(NEW)
runpy.run_path(str(NEW), run_name="__main__")
