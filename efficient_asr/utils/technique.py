"""What a technique declares about itself, and how techniques are found.

A technique is one module, or one package, with a `TECHNIQUE` in it. Those of this package are found in
`efficient_asr.techniques`; one of your own is added by its dotted path: with the YAML key `techniques`, the environment
variable `EFFICIENT_ASR_TECHNIQUES` (comma-separated), or `add_technique`. Shared code never names a technique: it asks all of
them through this module.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from efficient_asr.utils.errors import UserError, did_you_mean

PACKAGE, VARIABLE = "efficient_asr.techniques", "EFFICIENT_ASR_TECHNIQUES"


@dataclass(frozen=True)
class Key:
    """A key of the YAML files, with the values that it accepts.

    Attributes
    ----------
    name : str
        The key.
    least : int or float or None
        Lowest value; the key takes whole numbers where this is an `int`. None for keys that are not numbers.
    most : float or None
        Highest value.
    eval_only : bool
        Whether the key matters to measuring only, so that it may change between the start and the end of a training.
    untyped : bool
        Whether its values are of several types, such as a number, a word or a list.
    text : bool
        Whether its value is a text even where the YAML files have null.
    brain : str or None
        `"module:name"` of the Brain that uses the key: recipes with another Brain refuse a value other than null.
    former : str or None
        Value that was fixed before the key existed, as the YAML files write it: checkpoints from before go on with it.
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
    """A column that a technique adds to the tables, where any row has a value for it.

    Attributes
    ----------
    head : str
        Its heading.
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
    """What a technique declares.

    Objects are named as `"module:name"`, where `module` is relative to the technique's own package (or the module itself with
    `":name"`), so that declaring them imports nothing.

    Attributes
    ----------
    name : str
        As in Results and tables.
    parts : dict of str to str
        Stable name of a module that may stand in a model folder -> its class.
    former_names : dict of str to str
        Name of a part in older model folders -> its stable name.
    moved : dict of str to str
        Dotted path of an object in older YAML files -> where it is now.
    renamed_keys : dict of str to str
        Former name of a YAML key -> its name now.
    renamed_values : dict of str to dict
        YAML key -> former value -> value now.
    keys : tuple of Key
        Its YAML keys, as far as they have limits or are special.
    columns : tuple of Column
        What it adds to the tables.
    plot_groups : str or None
        `(result) -> str`: what shares a colour in plots; by default the technique does.
    folder_kinds : dict of str to str
        Value of `kind` in a model folder's config.json -> `(folder, load_model, language, options) -> Transcriber`.
    page_markers : dict of str to str
        Name of a marker in Markdown pages -> `(name, results_folder) -> str`, the text that belongs there.
    pictures : str or None
        `(results_folder) -> list of Path`: draws what belongs to the pages.
    """

    name: str
    parts: dict[str, str] = field(default_factory=dict)
    former_names: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    renamed_keys: dict[str, str] = field(default_factory=dict)
    renamed_values: dict[str, dict[str, str]] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    columns: tuple[Column, ...] = ()
    plot_groups: str | None = None
    folder_kinds: dict[str, str] = field(default_factory=dict)
    page_markers: dict[str, str] = field(default_factory=dict)
    pictures: str | None = None
    module: str = ""  # where it was found; filled in by `techniques`

    def load(self, reference: str) -> Any:
        """Import the object that `"module:name"` refers to."""
        module, _, name = reference.partition(":")
        return getattr(importlib.import_module(f"{self.module}.{module}" if module else self.module), name)


_added: list[str] = []  # dotted paths, in the order in which they came
_found: dict[str, Technique] = {}  # by module


def add_technique(module: str) -> Technique:
    """Make a technique known that lives outside this package.

    Arguments
    ---------
    module : str
        Dotted path of the module, or package, with its `TECHNIQUE`.

    Raises
    ------
    UserError
        Where it cannot be imported, declares nothing, or takes a name that another technique has.
    """
    technique = _declared(module, required=True)
    if module not in _added:
        for other in techniques():
            shared = other.module != module and ({other.name, *other.parts} & {technique.name, *technique.parts})
            if shared:
                raise UserError(
                    f"techniques: {module} and {other.module} both declare '{sorted(shared)[0]}'; rename one"
                )
        _added.append(module)
    return technique


def techniques() -> list[Technique]:
    """Return all techniques that are known, by name; those of the environment variable are among them."""
    package = importlib.import_module(PACKAGE)
    modules = [f"{PACKAGE}.{entry.name}" for entry in pkgutil.iter_modules(package.__path__)]
    found = [_declared(module, required=False) for module in modules]
    named = [path.strip() for path in os.environ.get(VARIABLE, "").split(",") if path.strip()]
    found += [_declared(module, required=True) for module in dict.fromkeys([*_added, *named])]
    return sorted(filter(None, found), key=lambda technique: technique.name)


def _declared(module: str, required: bool) -> Technique | None:
    """Return what a module declares; None where it declares nothing and need not."""
    if module in _found:
        return _found[module]
    try:
        declared = getattr(importlib.import_module(module), "TECHNIQUE", None)
    except ModuleNotFoundError as error:
        if not required or error.name is None or not module.startswith(error.name):
            raise
        raise UserError(
            f"techniques: there is no module '{module}'; name it by its dotted path, and put its folder on PYTHONPATH"
        ) from None
    if not isinstance(declared, Technique):
        if required:
            raise UserError(f"techniques: the module '{module}' has no TECHNIQUE = Technique(...)")
        return None
    _found[module] = Technique(**{**declared.__dict__, "module": module})
    return _found[module]


def find(attribute: str, name: str) -> Callable[..., Any] | None:
    """Return the object that a technique declares under `name` in one of its dictionaries; None where none does."""
    for technique in techniques():
        reference = getattr(technique, attribute).get(name)
        if reference is not None:
            return technique.load(reference)
    return None


def merged(attribute: str) -> dict[str, Any]:
    """Return one dictionary of all techniques together."""
    return {key: value for technique in techniques() for key, value in getattr(technique, attribute).items()}


def current_value(key: str, value: Any) -> Any:
    """Return the value of a setting as it is written today, for one that was stored under a former name."""
    if isinstance(value, str):
        return merged("renamed_values").get(key, {}).get(value, value)
    return value


def unknown_part(name: str) -> str:
    """Return what to say of a part that no technique declares."""
    known = [part for technique in techniques() for part in technique.parts]
    return (
        f"no technique here declares '{name}'.{did_you_mean(name, known)} If it is a technique of your own, name its module in "
        f"{VARIABLE}"
    )
