"""Former place of `efficient_asr.techniques.clsr.network`; this path works for one more release."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """Return an object of the module that this one became, with a warning."""
    found = getattr(importlib.import_module("efficient_asr.techniques.clsr.network"), name)
    warnings.warn(
        f"efficient_asr.techniques.clsr_network.{name} is now in efficient_asr.techniques.clsr.network", stacklevel=2
    )
    return found
