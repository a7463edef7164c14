"""docs/reference/ is what the code says."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_reference_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
