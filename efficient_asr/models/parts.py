"""Saving and loading models made of parts, as plain data.

A part is a module with `to_config() -> dict` and a class method `from_config(dict)`. `config.json` stores it as
`{"type": "<name>", "config": {...}}`. The name does not depend on the location of the class: it is listed in `CORE_PARTS` or
declared by a technique (`efficient_asr.utils.technique`). A downloaded file cannot name any other class. Folders written by the
first version store the class path instead; they are read through `FORMER_NAMES` and the `former_names` of the techniques.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import current_value, find, merged, techniques, unknown_part

CORE_PARTS = {
    "ctc_head": "efficient_asr.models.ctc:CTCHead",
    "own_length": "efficient_asr.models.whisper.own_length:OwnLength",
    "ssl_encoder": "efficient_asr.models.encoders.ssl:SSLEncoder",
    "whisper_encoder": "efficient_asr.models.encoders.whisper:WhisperEncoder",
}
FORMER_NAMES = {
    "models.ctc.CTCHead": "ctc_head",
    "models.ssl.SSLEncoder": "ssl_encoder",
    "models.whisper.WhisperEncoder": "whisper_encoder",
}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Part(nn.Module):
    """Base class of the modules stored in a model folder.

    Attributes
    ----------
    technique : str or None
        Name of the technique it belongs to; None for parts that every model has.
    is_identity : bool
        Whether its setting leaves the baseline unchanged.
    label : str
        Short name of the technique's settings, for the tables.
    few_frames_advice : str
        What to change about the part if a model produces too few frames for the texts, such as `a smaller factor`.
    """

    technique: str | None = None
    is_identity: bool = False
    label: str = ""
    few_frames_advice: str = ""

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the part did over a whole benchmark, for `details` of the Result.

        Arguments
        ---------
        records : iterable of dict
            One for each utterance, with the `details` of its transcript.
        """
        return {}

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as plain data."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Part:
        """Build the part with random weights."""
        return cls(**config)


def stable_name(kind: type) -> str:
    """Return the name of a class in model folders.

    Raises
    ------
    UserError
        If no technique declares the class.
    """
    path = f"{kind.__module__}:{kind.__qualname__}"
    for name, reference in CORE_PARTS.items():
        if reference == path:
            return name
    for technique in techniques():
        for name, reference in technique.parts.items():
            module, _, attribute = reference.partition(":")
            if f"{technique.module}.{module}".rstrip(".") + f":{attribute}" == path:
                if name in CORE_PARTS:
                    raise UserError(
                        f"{path} cannot be saved as '{name}', the name of a part that every model has; rename it"
                    )
                return name
    raise UserError(
        f"{path} cannot be saved: no technique declares it among its parts (see docs/adding_a_technique.md)"
    )


def describe(part: nn.Module) -> dict[str, Any]:
    """Return the entry of a part for `config.json`."""
    if isinstance(part, nn.Identity):
        return {"type": "identity"}
    return {"type": stable_name(type(part)), "config": part.to_config()}


def find_class(name: Any, what: str) -> type[nn.Module]:
    """Return the class of a named part.

    Raises
    ------
    UserError
        If there is no such part, or a package it needs is not installed.
    """
    former = FORMER_NAMES | merged("former_names")
    name = former.get(str(name), str(name))
    try:
        if name in CORE_PARTS:
            module, _, attribute = CORE_PARTS[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        found = find("parts", name)
    except ModuleNotFoundError as error:
        raise UserError(f"{what}: '{name}' needs the package {error.name}, which is not installed") from None
    if found is None:
        raise UserError(f"{what}: {unknown_part(name)}; otherwise the model folder is damaged or cannot be trusted")
    return found


def build(entry: Any, what: str) -> nn.Module:
    """Build a part from its entry, with random weights.

    Raises
    ------
    UserError
        If the entry is malformed or names an unknown part.
    """
    name = entry.get("type") if isinstance(entry, dict) else None
    if name == "identity":
        return nn.Identity()
    part = find_class(name, what)
    try:
        return part.from_config(_current(entry.get("config", {})))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{what}: the configuration of '{name}' is damaged ({error!r})") from None


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a part under their current names."""
    renamed = merged("renamed_keys")
    names = {key: renamed.get(key, key) for key in config}
    return {names[key]: current_value(names[key], value) for key, value in config.items()}


def save_folder(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Write `model.safetensors` and `config.json` into a folder of `atomic_write`.

    Raises
    ------
    UserError
        If the weights cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, which safetensors does not report as OSError
        raise UserError(
            f"the model cannot be written to {folder.parent} ({error}); free some space, then rerun the command"
        ) from None
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read `model.safetensors` as float32.

    Raises
    ------
    UserError
        If the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        others = [
            p.name for p in sorted(Path(folder).iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        ]
        hint = (
            f"; {', '.join(others)} is in a format that can execute code when it is read, and was ignored"
            if others
            else ""
        )
        raise UserError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        return {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
