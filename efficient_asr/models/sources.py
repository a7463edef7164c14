"""Model sources: package assets, local directories, hub ids."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import expanded, sha256_of

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_source(source: str | os.PathLike[str]) -> str:
    """Return the asset path for `efficient_asr:<name>`; in other sources, expand environment variables and `~`.

    Raises
    ------
    UserError
        If an environment variable is unset or the package has no such asset.
    """
    source = os.fspath(source)
    if source.startswith("efficient_asr:"):
        path = ASSETS / source.removeprefix("efficient_asr:")
        if not path.exists():
            known = ", ".join(f"efficient_asr:{p.name}" for p in sorted(ASSETS.iterdir()) if p.name != "README.md")
            raise UserError(f"the package has no asset '{source}'; available assets: {known}")
        return str(path)
    return expanded(source)


def read_config(source: str) -> dict[str, Any]:
    """Return the config.json of a local model directory.

    Raises
    ------
    UserError
        If the file is missing or is not a JSON object.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise UserError(
                f"{source} is a peft adapter, not a complete model; merge it into its base (merge_and_unload) and save the "
                "result with save_pretrained"
            )
        raise UserError(f"{source} is not a model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not contain a JSON object")
    return config


def with_contents(options: dict[str, Any]) -> list[tuple[str, Any, str | None]]:
    """Return options, sorted, each with a checksum of its content if it names a file or a model folder: one may be replaced."""

    def content(value: Any) -> str | None:
        if not isinstance(value, (str, os.PathLike)) or not os.path.exists(value):
            return None
        return sha256_of(Path(value)) if os.path.isfile(value) else fingerprint(value)

    return [(key, value, content(value)) for key, value in sorted(options.items())]


def fingerprint(source: str | Path) -> str:
    """Return a checksum of the files in a model folder, and of the base of a peft adapter; for a hub id, return the id."""
    if not os.path.isdir(source):
        return str(source)
    digest = hashlib.sha256()
    files = (
        p for p in Path(source).rglob("*") if p.suffix in (".json", ".safetensors", ".bin", ".onnx") and p.is_file()
    )
    for path in sorted(files):
        digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if base := _adapted(Path(source)):
        digest.update(fingerprint(base).encode())
    return digest.hexdigest()


def _adapted(folder: Path) -> str | None:
    """Return the base of a peft adapter; None for another folder, and for a damaged one, which cannot be loaded either."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) and Path(base).resolve() != folder.resolve() else None
