"""Whispers whose network runs outside of PyTorch: ONNX Runtime (`onnx.py`), CTranslate2 (`ct2.py`).

A converted model is a folder. Next to the files of its engine it has what the rest of this package needs: the network's
`config.json` with an entry `backend` (in the subfolder `efficient_asr` if the engine has a `config.json` of its own), the
generation configuration and the tokenizer. `Whisper.from_source` opens such a folder like any other.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from efficient_asr.models.sources import fingerprint
from efficient_asr.settings.options import QUANTISATIONS, is_selection
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.locks import FolderLock

OWN_FOLDER = "efficient_asr"  # subfolder for our files where the engine's folder has a config.json of its own
ENTRY = "backend"
CACHE = "EFFICIENT_ASR_CACHE"  # environment variable: folder of the models converted while loading
_CLASSES = {"onnx": "onnx:OnnxWhisper", "ctranslate2": "ct2:CTranslate2Whisper"}
_CONVERTERS = {"onnx": "onnx_graphs:convert", "ctranslate2": "ct2:convert"}
_PACKAGES = {"onnx": ("onnxruntime",), "ctranslate2": ("ctranslate2",)}


def backend_class(name: str, where: str) -> Any:
    """Return the class of a backend.

    Raises
    ------
    UserError
        If the name is unknown, or the engine is not installed; `where` names its origin.
    """
    return _load(_CLASSES, name, where)


def convert(whisper: Any, folder: Path, backend: str, quantise: str | None = None) -> None:
    """Write the folder of a Whisper for a backend.

    Raises
    ------
    UserError
        If the backend or the quantisation is unknown, a package is missing, or the backend cannot run the model.
    """
    _check_source(whisper)
    if quantise is not None and quantise not in QUANTISATIONS:
        hint = " (a selection of layers runs with the backend torch only)" if is_selection(quantise) else ""
        raise UserError(f"quantise: '{quantise}' is invalid; use {', '.join(QUANTISATIONS)}{hint}")
    _load(_CONVERTERS, backend, "backend")(whisper, folder, quantise)


def converted(whisper: Any, source: str, backend: str, quantise: str | None) -> Any:
    """Return a Whisper for a backend, converted now or by an earlier call; converted models are kept in a cache.

    Arguments
    ---------
    whisper : Whisper
        The model, with its padding.
    source : str
        Folder or hub id that it was loaded from. A hub id is not looked up again: if its weights change there, delete the cache.
    backend, quantise
        See `convert`.
    """
    _check_source(whisper)
    _load(_CONVERTERS, backend, "backend")  # refuses an unknown one
    versions = {name: importlib.import_module(name).__version__ for name in _PACKAGES[backend]}
    key = [2, fingerprint(source), whisper.settings, backend, quantise, versions]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    cache = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "efficient_asr") / "backends"
    folder = cache / f"{Path(source).name}-{backend}-{digest}"
    if not folder.is_dir():
        check_writable(cache, CACHE)
        with FolderLock(cache, wait=True):
            if not folder.exists():
                convert(whisper, folder, backend, quantise)
                print(f"converted for the backend {backend}, and kept for next time: {folder}", file=sys.stderr)
    return type(whisper).from_source(str(folder))


def _check_source(whisper: Any) -> None:
    if whisper.backend != "torch":
        raise UserError(f"backend: {whisper.folder} is a model for the backend {whisper.backend}; convert the original")


def _load(names: dict[str, str], backend: str, where: str) -> Any:
    """Import what `names` has for a backend."""
    if backend not in names:
        raise UserError(f"{where}: '{backend}' is not a backend; use torch, {' or '.join(names)}")
    need(*_PACKAGES[backend])
    module, _, name = names[backend].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def need(*packages: str) -> None:
    """Check that optional packages are installed.

    Raises
    ------
    UserError
        Naming those that are not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {' and '.join(missing)}; install with: pip install 'efficient_asr[fast]'")


def own_folder(source: str) -> str:
    """Return the folder with this package's files of a converted model; any other source as it is."""
    inner = Path(source) / OWN_FOLDER
    return str(inner) if (inner / "config.json").is_file() else source
