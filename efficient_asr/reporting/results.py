"""Load results and group them by benchmark, normaliser and task."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from efficient_asr.evaluation.result import Result
from efficient_asr.utils.errors import UserError


def load_runs(folder: Path) -> list[Result]:
    """Read all results of a folder, sorted by file name."""
    return [Result.load(path) for path in sorted(Path(folder).glob("*.json"))]


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON file of `results/` that a script made.

    Raises
    ------
    UserError
        If there is none, naming the script.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with {made_by}")
    return json.loads(path.read_text(encoding="utf-8"))


def group_runs(results: list[Result]) -> dict[str, list[Result]]:
    """Group results by `corpus/split`; results of one split under several normalisers, and translations, are groups of their own.

    Such groups are named `corpus/split (normaliser)` and `corpus/split (normaliser, translation)`.

    Raises
    ------
    UserError
        If two results of a group were measured on different utterances.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    for result in results:
        kinds[f"{result.corpus}/{result.split}"].add(_kind(result))
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        name = f"{result.corpus}/{result.split}"
        groups[name if len(kinds[name]) == 1 else f"{name} ({_kind(result)})"].append(result)
    for name, members in groups.items():
        check_comparable(name, members)
        members.sort(key=lambda r: (r.technique != "none", r.technique, r.variant))
    return dict(groups)


def _kind(result: Result) -> str:
    """Return what results of one split must share to share a table: the normaliser, and whether they are translations."""
    return result.normaliser + (", translation" if "bleu" in result.details else "")


def machine_of(runtime: dict[str, Any]) -> str:
    """Return the machine of an entry of `runtimes`; times of different machines cannot be compared."""
    return f"{runtime['device_name']}, {runtime['threads']} threads"


def check_comparable(name: str, results: list[Result]) -> None:
    """Reject results of different benchmarks in one table.

    Raises
    ------
    UserError
        Naming the files and their hashes.
    """
    hashes: dict[str, list[str]] = defaultdict(list)
    for result in results:
        hashes[result.benchmark_hash].append(result.path.name if result.path else result.experiment)
    if len(hashes) > 1:
        shown = "; ".join(f"{key}: {', '.join(files)}" for key, files in hashes.items())
        raise UserError(
            f"results of {name} were measured on different utterances or with different normalisers and cannot share a table "
            f"({shown}); measure them again on the same data, or move one set to another folder"
        )


def baseline_of(results: list[Result]) -> Result | None:
    """Return the result without a technique; of several (such as the single models of a cascade), the most expensive."""
    return max((r for r in results if r.technique == "none"), key=lambda r: r.macs_g or 0.0, default=None)
