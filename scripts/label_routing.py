"""Moved to recipes/decider/label.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

NEW = Path(__file__).parents[1] / "recipes/decider/label.py"
print("warning: scripts/label_routing.py has moved to recipes/decider/label.py", file=sys.stderr)
sys.argv[0] = str(NEW)
runpy.run_path(str(NEW), run_name="__main__")
