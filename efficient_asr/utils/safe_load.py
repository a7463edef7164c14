"""Loading of training states without executing code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from efficient_asr.utils.errors import UserError


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state with torch's restricted unpickler.

    Raises
    ------
    UserError
        If the file contains anything but tensors and plain values; nothing in it is executed.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(
            f"{path} is damaged or contains more than tensors and plain values; it could execute code and was not read "
            f"({reason}). Remove the folder that contains it."
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} does not contain a training state")
    return state
