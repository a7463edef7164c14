"""`train.py --help`: run options, the keys of a YAML file with their comments and defaults, and an example."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap, TaggedScalar

from efficient_asr.settings.command_line import RUN_OPTIONS
from efficient_asr.settings.yaml import comment_of, merge_includes, shown

HPARAMS = Path(__file__).parents[2] / "hparams"
_COMMON_RUN_OPTIONS = {
    "device": "cpu or cuda; by default cuda if there is a GPU",
    "precision": "fp32, bf16 or fp16",
    "debug": "run a few batches only, to check that everything works",
    "distributed_backend": "nccl or gloo, for torchrun",
    "noprogressbar": "hide progress bars",
}


def yaml_files_of(recipe: str) -> list[Path]:
    """Return the YAML files of a recipe in this repository, the one with the same name first."""
    found = [path for path in sorted(HPARAMS.glob("*.yaml")) if merge_includes(path).get("recipe") == recipe]
    return sorted(found, key=lambda path: (path.stem != recipe, path.stem not in recipe))


def recipe_help(path: Path | None, recipe: str | None, description: str, script: str = "train.py") -> str:
    """Return the text that `--help` prints.

    Arguments
    ---------
    path : Path or None
        The YAML file; None for the recipe's own.
    recipe : str or None
        The recipe.
    description : str
        What the recipe does.
    script : str
        Name of the script in the recipe's folder.
    """
    trains = script == "train.py"
    options = [*_COMMON_RUN_OPTIONS] if trains else ["device"]
    files = [path] if path is not None else yaml_files_of(recipe) if recipe else []
    lines = [_docstring_of(recipe, script) or description.strip(), ""]
    script = f"recipes/{recipe or '<exp>'}/{script}"
    lines += [f"usage: python {script} YAML [--key value ...]", ""]
    lines += [
        "Run options:",
        *_table((f"--{k}", shown(RUN_OPTIONS[k]), _COMMON_RUN_OPTIONS[k]) for k in options),
    ]
    lines += _table([
        ("--print_yaml", "", "print the YAML file with its includes, then exit"),
        *([("--estimate", "[FILE.json]", "time a few batches; print the hours and memory that the run needs")] if trains else []),
        ("--help", "", "print this help; put a YAML file first to list its keys"),
    ])  # fmt: skip
    if files:
        lines += ["", f"Keys of {_relative(files[0])}, set with --key value:"]
        lines += _table((f"--{key}", default, comment) for key, default, comment in described_keys(files[0]))
        example = "--experiment my_first"
        example += " --number_of_epochs 2" if script.endswith("train.py") else ""
        lines += ["", "Example:", f"  python {script} {_relative(files[0])} {example}"]
        if len(files) > 1:
            lines.append(f"  Other YAML files of this recipe: {', '.join(map(_relative, files[1:]))}")
    return "\n".join(lines)


def _docstring_of(recipe: str | None, script: str) -> str:
    """Return the docstring of a recipe's script in this repository; empty if there is none."""
    path = HPARAMS.parent / "recipes" / str(recipe) / script
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") if path.is_file() else ""


def described_keys(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and comment of every key of a YAML file that can be set on the command line."""
    tree = merge_includes(path)
    for key, value in tree.items():
        tag = getattr(getattr(value, "tag", None), "value", None) or ""
        if key.startswith("__") or tag.startswith(("!new:", "!name:", "!apply:")):
            continue
        yield key, default_text(value), comment_of(tree, key)


def default_text(value: Any) -> str:
    """Return a default as shown in the help."""
    if isinstance(value, TaggedScalar) and value.tag.value == "!PLACEHOLDER":
        return "(must be given)"
    if isinstance(value, CommentedMap):
        return f"{{{', '.join(value)}}}"
    if value is None:
        return "null"
    return value if isinstance(value, str) else shown(value)


def _table(rows: Any) -> list[str]:
    """Return aligned lines of name, default and comment; a long default pushes its comment to a line of its own."""
    lines = []
    for name, default, comment in rows:
        if len(default) > 24 and comment:
            lines += [f"  {name:<30} {default}", f"{'':<57} {comment}"]
        else:
            lines.append(f"  {name:<30} {default:<24} {comment}".rstrip())
    return lines


def _relative(path: Path) -> str:
    """Return a path as a user would type it."""
    path = Path(path)
    return str(path.relative_to(HPARAMS.parent)) if path.is_absolute() and HPARAMS.parent in path.parents else str(path)
