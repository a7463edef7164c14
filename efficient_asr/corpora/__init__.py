"""Corpora: each module prepares one dataset with `prepare(data_folder, out_folder, **options) -> {split: manifest}`.

The YAML names a corpus by its module in this package (`corpus: librispeech`) or by the dotted path of your own module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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
    """Prepare one corpus after checking names and types of its options.

    Raises
    ------
    UserError
        If the corpus has no such option, or the value is of another type.
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
    try:
        types = get_type_hints(prepare)
    except (NameError, TypeError):  # of somebody's own corpus
        types = {}
    checked = {key: _checked(key, value, types.get(key, Any)) for key, value in options.items()}
    return prepare(data_folder, Path(out_folder), **checked)


_WORDS = {str: "a text", int: "an integer", float: "a number", bool: "True or False", list: "a list", dict: "a mapping"}


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return the value of an option if it has the type that `prepare` declares; a text alone becomes a list if that is expected.

    Raises
    ------
    UserError
        Naming the option and the type.
    """
    each = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {get_origin(kind) or kind for kind in each}
    if not kinds <= {*_WORDS, NoneType}:  # of somebody's own corpus
        return value
    if any(isinstance(value, kind) for kind in kinds - {int, float}):
        return value
    numbers = (int, float) if float in kinds else (int,) if int in kinds else ()
    if isinstance(value, numbers) and not isinstance(value, bool):
        return value
    if list in kinds and isinstance(value, str):
        return [value]
    wanted = " or ".join(word for kind, word in _WORDS.items() if kind in kinds)
    raise UserError(f"corpus_options: {key}: expected {wanted}, got {value!r}")
