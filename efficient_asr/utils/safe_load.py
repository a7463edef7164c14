"""efficient_asr.utils.safe_load."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from efficient_asr.utils.errors import UserError


def load_state(path: Path) -> dict[str, Any]:
    """Read a state with torch's restricted unpickler.

    Raises
    ------
    UserError
        Where the file holds anything but tensors and plain values, which is refused without executing it.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors and plain values, or is damaged; it could execute code and was not read "
            f"({reason}). Remove the folder that holds it."
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} does not hold the state of a training")
    return state
