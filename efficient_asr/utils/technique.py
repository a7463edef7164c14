"""Technique declarations, and how techniques are discovered.

A technique is a module or package that defines `TECHNIQUE`. The built-in ones are discovered in `efficient_asr.techniques`.
Add your own by its dotted path: with the YAML key `techniques`, the environment variable `EFFICIENT_ASR_TECHNIQUES`
(comma-separated), or `add_technique`. Shared code never names a technique: it queries all of them through this module.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from efficient_asr.utils.errors import UserError, did_you_mean

PACKAGE, VARIABLE = "efficient_asr.techniques", "EFFICIENT_ASR_TECHNIQUES"


@dataclass(frozen=True)
class Key:
    """A YAML key and the values that it accepts.

    Attributes
    ----------
    name : str
        The key.
    least : int or float or None
        Lowest value. If this is an `int`, the key takes integers. None for keys that are not numbers.
    most : float or None
        Highest value.
    eval_only : bool
        Whether the key affects evaluation only, so that it may change between the start and the end of training.
    untyped : bool
        Whether the key accepts values of several types, such as a number, a word or a list.
    text : bool
        Whether the value is a string even if it is null in the YAML files.
    brain : str or None
        `"module:name"` of the Brain that uses the key. Recipes with another Brain reject any value but null.
    former : str or None
        Value that was fixed before the key existed, as written in YAML. Older checkpoints are resumed with it.
    """

    name: str
    least: int | float | None = None
    most: float | None = None
    eval_only: bool = False
    untyped: bool = False
    text: bool = False
    brain: str | None = None
    former: str | None = None


@dataclass(frozen=True)
class Column:
    """A column that a technique adds to tables in which any row has a value for it.

    Attributes
    ----------
    head : str
        Heading.
    entry : str
        Key of `details` in the Result.
    digits : int
        Decimal places.
    """

    head: str
    entry: str
    digits: int = 2


@dataclass(frozen=True)
class Technique:
    """The declaration of a technique.

    Objects are referenced as `"module:name"`, where `module` is relative to the technique's own package; `":name"` is an object
    of the declaring module. Declaring them therefore imports nothing.

    Attributes
    ----------
    name : str
        Name in Results and tables.
    parts : dict of str to str
        Stable name of a module that a model folder may contain -> its class.
    former_names : dict of str to str
        Name of a part in older model folders -> its stable name.
    moved : dict of str to str
        Dotted path of an object in older YAML files -> its current path.
    renamed_keys : dict of str to str
        Former name of a YAML key -> its current name.
    renamed_values : dict of str to dict
        YAML key -> former value -> current value.
    former_weights : dict of str to str
        Former prefix of weight names in training checkpoints -> current prefix.
    keys : tuple of Key
        Its YAML keys that have limits or special properties.
    columns : tuple of Column
        Columns that it adds to the tables.
    plot_groups : str or None
        `(result) -> str`: group of a result; a group shares a colour in plots. By default, the technique.
    folder_kinds : dict of str to str
        Value of `kind` in a model folder's config.json -> `(folder, load_model, language, options) -> Transcriber`.
    encoder_paddings : dict of str to str
        Value of `encoder_padding` -> a class with `calibrate(whisper, wavs, ...)`, for what stands behind the audio in Whisper.
    load_options : dict of str to str
        Option of `load_transcriber` for Whisper models -> `(model, value) -> Whisper`, called after the model was loaded.
    page_markers : dict of str to str
        Name of a marker in Markdown pages -> `(name, results_folder) -> str`, the text to insert.
    pictures : str or None
        `(results_folder) -> list of Path`: draws the figures of the pages.
    """

    name: str
    parts: dict[str, str] = field(default_factory=dict)
    former_names: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    renamed_keys: dict[str, str] = field(default_factory=dict)
    renamed_values: dict[str, dict[str, str]] = field(default_factory=dict)
    former_weights: dict[str, str] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    columns: tuple[Column, ...] = ()
    plot_groups: str | None = None
    folder_kinds: dict[str, str] = field(default_factory=dict)
    encoder_paddings: dict[str, str] = field(default_factory=dict)
    load_options: dict[str, str] = field(default_factory=dict)
    page_markers: dict[str, str] = field(default_factory=dict)
    pictures: str | None = None
    module: str = ""  # dotted path; filled in by `techniques`

    def load(self, reference: str) -> Any:
        """Import the object that `"module:name"` refers to."""
        module, _, name = reference.partition(":")
        return getattr(importlib.import_module(f"{self.module}.{module}" if module else self.module), name)


_added: list[str] = []  # dotted paths, in registration order
_found: dict[str, Technique] = {}  # by module


def add_technique(module: str) -> Technique:
    """Register a technique from outside this package.

    Arguments
    ---------
    module : str
        Dotted path of the module or package that defines `TECHNIQUE`.

    Raises
    ------
    UserError
        If it cannot be imported, defines no `TECHNIQUE`, or uses a name that another technique declares.
    """
    technique = _declared(module, required=True)
    if module not in _added:
        _check_names(technique, techniques())
        _added.append(module)
    return technique


def techniques() -> list[Technique]:
    """Return all known techniques, sorted by name, including those in the environment variable."""
    return list(_known(tuple(_added), os.environ.get(VARIABLE, "")))


@functools.cache
def _known(added: tuple[str, ...], variable: str) -> tuple[Technique, ...]:
    """Return the built-in techniques, those that were added, and those of the environment variable."""
    package = importlib.import_module(PACKAGE)
    built_in = [
        _declared(f"{PACKAGE}.{entry.name}", required=False) for entry in pkgutil.iter_modules(package.__path__)
    ]
    named = [path.strip() for path in variable.split(",") if path.strip()]
    known = [technique for technique in built_in if technique is not None]
    for module in dict.fromkeys([*added, *named]):
        technique = _declared(module, required=True)
        _check_names(technique, known)
        known.append(technique)
    return tuple(sorted(known, key=lambda technique: technique.name))


def _check_names(technique: Technique, others: Iterable[Technique]) -> None:
    """Refuse a technique with a name that another one has.

    Raises
    ------
    UserError
        Naming both modules.
    """
    for other in others:
        shared = {other.name, *other.parts} & {technique.name, *technique.parts}
        if shared and other.module != technique.module:
            raise UserError(
                f"techniques: {technique.module} and {other.module} both declare '{sorted(shared)[0]}'; rename one"
            )


def _declared(module: str, required: bool) -> Technique | None:
    """Return the technique that a module declares; None if it declares none and `required` is False."""
    if module in _found:
        return _found[module]
    try:
        declared = getattr(importlib.import_module(module), "TECHNIQUE", None)
    except ModuleNotFoundError as error:
        if not required or error.name is None or not module.startswith(error.name):
            raise
        raise UserError(
            f"techniques: no module '{module}'; use its dotted path, and add its folder to PYTHONPATH"
        ) from None
    if not isinstance(declared, Technique):
        if required:
            raise UserError(f"techniques: the module '{module}' has no TECHNIQUE = Technique(...)")
        return None
    _found[module] = Technique(**{**declared.__dict__, "module": module})
    return _found[module]


def find(attribute: str, name: str) -> Callable[..., Any] | None:
    """Return the object that a technique declares under `name` in one of its dictionaries; None if none does."""
    for technique in techniques():
        reference = getattr(technique, attribute).get(name)
        if reference is not None:
            return technique.load(reference)
    return None


def merged(attribute: str) -> dict[str, Any]:
    """Return the dictionaries of all techniques, merged into one."""
    return {key: value for technique in techniques() for key, value in getattr(technique, attribute).items()}


def current_value(key: str, value: Any) -> Any:
    """Return the current name of a setting's value, which may be stored under a former name."""
    if isinstance(value, str):
        return merged("renamed_values").get(key, {}).get(value, value)
    return value


def unknown_part(name: str) -> str:
    """Return the error message for a part that no technique declares."""
    known = [part for technique in techniques() for part in technique.parts]
    return (
        f"no technique declares '{name}'.{did_you_mean(name, known)} If it belongs to a technique of your own, add its module to "
        f"{VARIABLE}"
    )
