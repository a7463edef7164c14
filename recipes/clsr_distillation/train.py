"""Moved to recipes/clsr/train.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

NEW = Path(__file__).parents[1] / "clsr" / "train.py"
print("warning: recipes/clsr_distillation/train.py has moved to recipes/clsr/train.py", file=sys.stderr)
sys.argv[0] = str(NEW)
runpy.run_path(str(NEW), run_name="__main__")
