"""Moved to recipes/clsr/cost.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

NEW = Path(__file__).parents[1] / "recipes/clsr/cost.py"
print("warning: scripts/cost_of_experts.py has moved to recipes/clsr/cost.py", file=sys.stderr)
sys.argv[0] = str(NEW)
runpy.run_path(str(NEW), run_name="__main__")
