"""Saving and loading models built of parts, as plain data.

A part is a module with `to_config() -> dict` and a class method `from_config(dict)`. In `config.json` it stands as
`{"type": "<module>.<Class>", "config": {...}}`, where the path is relative to this package: a new technique needs no
registration, and a downloaded file cannot name anything outside `efficient_asr.models` and `efficient_asr.techniques`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from efficient_asr.errors import UserError
from efficient_asr.files import write_whole

_TYPE = re.compile(r"(models|techniques)\.([a-z_0-9]+)\.([A-Z]\w*)")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def describe(part: torch.nn.Module) -> dict[str, Any]:
    """Return the entry of a part for `config.json`."""
    if isinstance(part, torch.nn.Identity):
        return {"type": "identity"}
    module = type(part).__module__.removeprefix("efficient_asr.")
    return {"type": f"{module}.{type(part).__name__}", "config": part.to_config()}


def find_class(kind: Any, what: str) -> type[torch.nn.Module]:
    """Return the class that `<module>.<Class>` names.

    Raises
    ------
    UserError
        Where it names anything but a module of this package.
    """
    match = _TYPE.fullmatch(str(kind))
    if not match:
        raise UserError(
            f"{what}: '{kind}' is not a part of efficient_asr; the model folder is damaged or not to be trusted"
        )
    try:
        found = getattr(importlib.import_module(f"efficient_asr.{match[1]}.{match[2]}"), match[3])
    except (ModuleNotFoundError, AttributeError) as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and not missing.startswith("efficient_asr"):
            raise UserError(f"{what}: '{kind}' needs the package {missing}, which is not installed") from None
        raise UserError(f"{what}: this version of efficient_asr has no '{kind}'") from None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise UserError(f"{what}: '{kind}' is not a part of efficient_asr")
    return found


def build(entry: Any, what: str) -> torch.nn.Module:
    """Build a part from its entry, with random weights.

    Raises
    ------
    UserError
        Where the entry is malformed or names something that is not a part of this package.
    """
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind == "identity":
        return torch.nn.Identity()
    part = find_class(kind, what)
    if not hasattr(part, "from_config"):
        raise UserError(f"{what}: '{kind}' is not a part of efficient_asr")
    try:
        return part.from_config(entry.get("config", {}))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{what}: the configuration of '{kind}' is damaged ({error!r})") from None


def save_folder(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; each file appears whole or not at all, the configuration last.

    Raises
    ------
    UserError
        Where the weights cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    try:
        save_file(tensors, folder / (WEIGHTS + ".partial"), metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, which is no OSError there
        (folder / (WEIGHTS + ".partial")).unlink(missing_ok=True)
        raise UserError(
            f"the model cannot be written to {folder} ({error}); make room, then start the command again"
        ) from None
    os.replace(folder / (WEIGHTS + ".partial"), folder / WEIGHTS)
    write_whole(folder / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read `model.safetensors` as float32.

    Raises
    ------
    UserError
        Where it is missing or damaged.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        others = [
            p.name for p in sorted(Path(folder).iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        ]
        hint = (
            f"; {', '.join(others)} is in a format that can execute code when it is read, and is not" if others else ""
        )
        raise UserError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        return {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
