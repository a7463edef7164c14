"""Settings: YAML files and the command line, merged and checked before anything runs.

YAML files are HyperPyYAML and can execute code: run only those you trust. `base: !include:other.yaml` (or a list of includes)
loads all keys of another file; the file's own keys take precedence, and every key can be overridden on the command line.
"""

from __future__ import annotations

import copy
import datetime
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.settings.command_line import Overrides, key_hint
from efficient_asr.settings.limits import check_limit, key_of, known_keys
from efficient_asr.settings.renamed import current_key, renamed_keys, with_current_names
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import expanded
from efficient_asr.utils.technique import add_technique, current_value


def merge_includes(path: Path) -> CommentedMap:
    """Read a YAML file without constructing objects, and merge in the keys and comments of its `base` files.

    Raises
    ------
    UserError
        If a file is missing or is not valid YAML.
    """
    merged = CommentedMap()
    for tree in _files(path):
        merged.update(tree)
        for key in tree:
            if key in tree.ca.items:
                before = comment_of(merged, key)
                merged.ca.items[key] = tree.ca.items[key]
                token = tree.ca.items[key][2]
                if before and token is not None and not comment_of(tree, key):  # the comment of the base still holds
                    token.value = f"# {before}{token.value}"
    return merged


def nullable_keys(path: Path) -> set[str]:
    """Return the keys of a YAML file that may be null: null in one of its files, or according to their comment."""
    keys = set()
    for tree in _files(path):
        for key, value in tree.items():
            if value is None or re.search(r"\bnull\b", comment_of(tree, key)):
                keys.add(key)
    return keys


def comment_of(tree: CommentedMap, key: str) -> str:
    """Return the comment on a key's line, without the `#`; empty if there is none."""
    comment = tree.ca.items.get(key, [None] * 3)[2]
    return comment.value.split("\n")[0].lstrip("# ").strip() if comment is not None else ""


def _files(path: Path) -> Iterator[CommentedMap]:
    """Yield the trees of a YAML file's bases, then its own."""
    yaml = ruamel.yaml.YAML()
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no YAML file at {path}") from None
    except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path} contains no keys")
    bases = tree.pop("base", [])
    for base in bases if isinstance(bases, list) else [bases]:
        tag = base.tag.value if isinstance(base, TaggedScalar) else ""
        if not tag.startswith("!include:"):
            raise UserError(f"{path}: base must be !include:<file> or a list of these")
        yield from _files(Path(path).parent / tag.removeprefix("!include:"))
    for key, value in tree.items():
        if isinstance(value, datetime.date):  # `experiment: 2024-01-01` is a name, not a date
            tree[key] = value.isoformat()
    _attach_comments(tree)
    _add_techniques(tree.get("techniques"))
    yield with_current_names(tree, str(path))


def _attach_comments(tree: CommentedMap) -> None:
    """Give each key the comment on its line: ruamel attaches that of a tagged value, such as a placeholder, to the next key."""
    keys = list(tree)
    for above, key in itertools.pairwise(keys):
        found = tree.ca.items.get(key)
        if found and found[1] and isinstance(tree[above], TaggedScalar):
            tree.ca.items[above] = [None, None, found[1][0], None]
            found[1] = found[1][1:] or None


class _Representer(ruamel.yaml.RoundTripRepresenter):
    """Writes null, True and False in the style of our YAML files."""

    def represent_none(self, data: None) -> Any:
        """Write null."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_bool(self, data: bool, anchor: Any = None) -> Any:
        """Write True or False."""
        return self.represent_scalar("tag:yaml.org,2002:bool", str(bool(data)), anchor=anchor)


_Representer.add_representer(type(None), _Representer.represent_none)
_Representer.add_representer(bool, _Representer.represent_bool)
_Representer.add_representer(ruamel.yaml.scalarbool.ScalarBoolean, _Representer.represent_bool)


def _add_techniques(modules: Any) -> None:
    """Register the techniques that a YAML file lists by their dotted paths."""
    for module in [modules] if isinstance(modules, str) else modules or []:
        add_technique(str(module))


def to_text(tree: CommentedMap) -> str:
    """Return a tree as YAML."""
    stream = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.Representer, yaml.width = _Representer, 1 << 20
    yaml.dump(tree, stream)
    return stream.getvalue()


def complete_yaml(path: Path, overrides: dict[str, Any], run_opts: RunOptions | None = None) -> str:
    """Return one YAML file with the bases and the command line values merged in; running it gives the same run.

    Raises
    ------
    UserError
        See `overridden`.
    """
    tree = _with_run_options(overridden(path, overrides), run_opts)
    return f"# {path}, with its includes and command line overrides.\n{to_text(tree)}"


def load_hparams(
    path: Path, overrides: dict[str, Any], run_opts: RunOptions | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Construct the objects of a YAML file.

    Returns
    -------
    hparams : dict
        Every key with its value or object.
    plain : dict
        The keys with plain values, as used in the run, for logging.

    Raises
    ------
    UserError
        For an unknown key (naming the closest), an invalid value, or an error raised by the constructed classes.
    """
    tree = overridden(path, overrides)
    paths = _paths(tree)
    for key in run_opts.overridden_args if run_opts is not None else ():
        check_limit(key, getattr(run_opts, key))
    for key, value in tree.items():
        if isinstance(value, TaggedScalar) and value.tag.value == "!PLACEHOLDER":
            raise UserError(f"{path}: '{key}' must be given, for example with --{key} VALUE")
        check_limit(key, value)
    tree.update({key: _expanded(key, value) for key, value in paths.items()})
    try:
        hparams = load_hyperpyyaml(to_text(tree))
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError, ruamel.yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from error
    plain = {k: v for k, v in hparams.items() if isinstance(v, (str, int, float, list, dict, type(None)))}
    plain |= {k: _words(v) for k, v in tree.items() if k not in plain and not k.startswith("__")}  # objects
    for key, value in paths.items():  # as written: not the paths of this machine
        if isinstance(plain.get(key), str):
            plain[key] = re.sub(r"<(\w+)>", lambda name: str(plain.get(name[1], name[0])), _text_of(value))
    return hparams, _with_run_options(plain, run_opts)


def _text_of(value: Any) -> str:
    """Return a string, or the text of a `!ref`; empty for other values."""
    text = value.value if isinstance(value, TaggedScalar) and _tag(value) == "!ref" else value
    return str(text) if isinstance(text, str) else ""


def _paths(tree: CommentedMap) -> dict[str, Any]:
    """Return the paths of a YAML file by key, after those that they refer to, as written."""
    texts = {key: _text_of(value) for key, value in tree.items()}
    named = {key for key in tree if re.search(r"(^|_)(folder|manifest|path|file|cache|url)$", key)}
    used = {name for key in named for name in re.findall(r"<(\w+)>", texts[key])} - named
    used = {name for name in used if texts.get(name, "").startswith(("$", "~"))}
    found = {key for key in named if "$" in texts[key] or texts[key].startswith("~")} | used
    found |= {key for key in named if any(f"<{name}>" in texts[key] for name in found)}
    ordered = sorted((key for key in tree if key in found), key=lambda key: _tag(tree[key]) == "!ref")
    return {key: tree[key] for key in ordered}


def _expanded(key: str, value: Any) -> Any:
    """Return a path with environment variables and `~` replaced; `!ref` values are copied, not changed."""
    text = _text_of(value)
    try:
        text = expanded(text)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if isinstance(value, TaggedScalar):
        value = copy.copy(value)
        value.value = text
        return value
    return text


def training_settings(path: Path, overrides: dict[str, Any], run_opts: RunOptions) -> dict[str, str]:
    """Return the settings that training depends on, by key, as written in YAML, including objects."""
    tree, known = _with_run_options(overridden(path, overrides), run_opts), known_keys()
    return {key: _words(value) for key, value in tree.items() if not (key in known and known[key].eval_only)}


def _with_run_options(settings: Any, run_opts: RunOptions | None) -> Any:
    """Return settings by key, in place, with the command line options that SpeechBrain consumes."""
    for key in run_opts.overridden_args if run_opts is not None else ():
        if key in settings:
            settings[key] = getattr(run_opts, key)
    return settings


def _words(value: Any) -> str:
    """Return a value as written in YAML, on one line and without comments."""
    text = to_text(CommentedMap({"x": _without_comments(copy.deepcopy(value))})).removeprefix("x:")
    return " ".join(line.strip() for line in text.split("\n") if line.strip())


def _without_comments(value: Any) -> Any:
    """Remove the comments from a value in place, and return it."""
    if isinstance(value, (CommentedMap, CommentedSeq)):
        value.ca.items.clear()
        value.ca.comment = None
        value.ca.end = []
        for item in value.values() if isinstance(value, CommentedMap) else value:
            _without_comments(item)
    return value


def overridden(path: Path, overrides: dict[str, Any]) -> CommentedMap:
    """Return the tree of a YAML file with the command line values applied.

    Raises
    ------
    UserError
        For an unknown key, naming the closest, or a value of the wrong type.
    """
    tree = merge_includes(path)
    if not overrides:
        return tree
    nullable = nullable_keys(path)
    _add_techniques(overrides.get("techniques"))
    text = overrides.text if isinstance(overrides, Overrides) else {}
    renamed = renamed_keys()
    for given, value in overrides.items():
        key = current_key(given, tree, renamed)
        if key not in tree:
            raise UserError(f"--{key}: {_unknown(key, path, tree)}")
        value = current_value(key, value)
        default, written = tree[key], text.get(given, "")
        if written is None and not isinstance(default, bool):
            raise UserError(f"--{key} needs a value (default {shown(default)})")
        if written and value is not None and _is_text(key, default) and not _tag(value):
            value = value if isinstance(value, str) else written
        if isinstance(default, (CommentedSeq, CommentedMap)) and isinstance(value, str) and value[:1] in ("[", "{"):
            raise UserError(
                f"command line: cannot parse '--{key} {value}'; check for an unclosed bracket or quotation mark"
            )
        if not (value is None and key in nullable):
            _check_type(key, default, value)
        tree[key] = value
    return tree


def _tag(value: Any) -> str:
    """Return the YAML tag of a value, such as `!new:torch.nn.Linear`; empty if it has none."""
    return getattr(getattr(value, "tag", None), "value", None) or ""


def _is_text(key: str, default: Any) -> bool:
    """Whether the value of a key is always a string, even if it looks like another type."""
    tag = _tag(default)
    if tag == "!ref":  # a reference to a single key has that key's type
        return re.fullmatch(r"<[^<>]*>", str(default.value)) is None
    return (not tag and isinstance(default, str) and not key_of(key).untyped) or key_of(key).text


def _unknown(key: str, path: Path, tree: CommentedMap) -> str:
    """Return the error message for a key that a YAML file does not have."""
    head, dot, inner = key.partition(".")
    if not dot or head not in tree:
        return f"{path} has no such key.{key_hint(key, tree)}"
    value = tree[head]
    for part in inner.split("."):
        value = value.get(part) if isinstance(value, CommentedMap) else None
    reference = re.fullmatch(r"<([^<>]*)>", str(value.value)) if _tag(value) == "!ref" else None
    if reference:
        return f"nested keys cannot be set; use --{reference[1]}, which it refers to"
    what = f"pass the whole value: --{head} '{_words(tree[head])}' with your change"
    return f"nested keys cannot be set; {what}"


def type_name(value: Any) -> str:
    """Return the name of a value's type for messages."""
    names = {
        bool: "True or False",
        int: "int",
        float: "float",
        str: "a string",
        CommentedSeq: "a list",
        CommentedMap: "a map",
    }
    return next(name for kind, name in names.items() if isinstance(value, kind))


def shown(value: Any) -> str:
    """Return a value as shown in messages."""
    if value is None:
        return "null"
    return _words(value) if isinstance(value, (CommentedMap, CommentedSeq, TaggedScalar)) else repr(value)


def _check_type(key: str, default: Any, value: Any) -> None:
    """Reject a value of another type than the default, such as a number instead of a word."""
    if _tag(value):
        return  # an object chosen by the user
    tag = _tag(default)
    if tag and not tag.startswith(("!PLACEHOLDER", "!ref")):
        raise UserError(
            f"--{key}: the value is an object ({tag}); change its settings, or pass another !new: or !name: object"
        )
    for kind in (bool, (int, float), str, CommentedSeq, CommentedMap):
        if isinstance(default, kind) and not tag and not key_of(key).untyped:
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            fits = fits or (kind is str and value is None) or (kind is CommentedSeq and isinstance(value, str))
            if not fits:
                raise UserError(
                    f"expected {type_name(default)} for {key}, got {shown(value)} (default {shown(default)})"
                )
            return
