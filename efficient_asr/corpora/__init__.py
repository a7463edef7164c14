"""How to get one dataset: each module has `prepare(data_folder, out_folder, **options) -> {split: manifest}`.

A corpus is named in YAML by its module here (`corpus: librispeech`) or by the dotted path of your own module.
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
        Where no such module exists; the message names the closest one.
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
            f"unknown corpus '{name}'; there are {', '.join(known)}, or a dotted path of yours.{hint}"
        ) from None


def prepare_corpus(name: str, data_folder: str | None, out_folder: Path, options: dict) -> dict[str, Path]:
    """Prepare one corpus after checking the names of its options.

    Raises
    ------
    UserError
        Where an option is not one of the corpus.
    """
    prepare = get_corpus(name)
    if not isinstance(options, dict):
        raise UserError(f"corpus_options must map names to values, not {options!r}")
    known = list(inspect.signature(prepare).parameters)[2:]
    for key in options:
        if key not in known:
            raise UserError(
                f"corpus_options: '{key}' is not an option of corpus '{name}' ({', '.join(known) or 'it has none'})."
                + did_you_mean(key, known)
            )
    return prepare(data_folder, Path(out_folder), **options)
