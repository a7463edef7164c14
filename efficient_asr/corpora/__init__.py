"""Corpora: each module prepares one dataset with `prepare(data_folder, out_folder, **options) -> {split: manifest}`.

The YAML names a corpus by its module in this package (`corpus: librispeech`) or by the dotted path of your own module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

from efficient_asr.utils.errors import UserError, did_you_mean

Prepare = Callable[..., dict[str, Path]]


def get_corpus(name: str) -> Prepare:
    """Return the `prepare` function of a corpus.

    Raises
    ------
    UserError
        If no such module exists; the message suggests the closest name.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
        if not callable(getattr(module, "prepare", None)):
            raise UserError(f"corpus: the module '{path}' has no function prepare()")
        return module.prepare
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        hint = did_you_mean(name, known)
        raise UserError(
            f"unknown corpus '{name}'; choose from {', '.join(known)}, or give the dotted path of your own module.{hint}"
        ) from None


def prepare_corpus(name: str, data_folder: str | None, out_folder: Path, options: dict) -> dict[str, Path]:
    """Prepare one corpus after checking the names of its options.

    Raises
    ------
    UserError
        If the corpus has no such option.
    """
    prepare = get_corpus(name)
    if not isinstance(options, dict):
        raise UserError(f"corpus_options must map names to values, not {options!r}")
    known = list(inspect.signature(prepare).parameters)[2:]
    for key in options:
        if key not in known:
            raise UserError(
                f"corpus_options: '{key}' is not an option of corpus '{name}' (options: {', '.join(known) or 'none'})."
                + did_you_mean(key, known)
            )
    return prepare(data_folder, Path(out_folder), **options)
