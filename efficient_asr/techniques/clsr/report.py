"""Tables and figures of `scripts/reproduce_experts.sh` and `scripts/tune_experts.sh`: means over seeds, by language."""

from __future__ import annotations

import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.figures import pyplot, save_figure
from efficient_asr.reporting.results import check_comparable, load_runs
from efficient_asr.reporting.tables import markdown_table
from efficient_asr.techniques.clsr.experts import SIDES
from efficient_asr.utils.errors import UserError

BY_LANGUAGE = ("in_domain", "whole_dev")  # a folder contains results of one of them
WHOLE = {"cross_domain": "cross-domain WER %", "english": "English WER %"}
SPLITS = (*BY_LANGUAGE, *WHOLE)


def _spread(values: list[float | None], digits: int = 1) -> str:
    """Format the mean; for several values, append half the difference between the highest and the lowest."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {(max(known) - min(known)) / 2:.{digits}f}"


def methods_of(runs: list[Result]) -> dict[str, dict[str, list[Result]]]:
    """Group runs (one per seed) by variant and split; plain models come first, all others are sorted by technique.

    Raises
    ------
    UserError
        If the runs of a split were not evaluated on the same utterances.
    """
    found: dict[str, dict[str, list[Result]]] = {}
    for split in SPLITS:
        of_split = [run for run in runs if run.split == split]
        check_comparable(f"results/experts, {split}", of_split)
        for run in sorted(of_split, key=_rank):
            found.setdefault(run.variant, {}).setdefault(split, []).append(run)
    return found


def _rank(run: Result) -> tuple:
    return run.hparams.get("test_only") is not True, run.technique, run.variant, run.provenance["date"]


def experts_table(runs: list[Result]) -> str:
    """Format a table of WER by language and test set, with trained parameters and size of each method."""
    present = [split for split in SPLITS if any(run.split == split for run in runs)]
    main, rest = present[0], present[1:]
    languages = list(next(run for run in runs if run.split == main).details["languages"])
    sizes = ", ".join(
        f"{run.split} {run.utterances} utterances, {run.reference_words} words"
        for run in (next(run for run in runs if run.split == split) for split in present)
    )
    counted = any(run.macs_g is not None for run in runs)
    head = ["model", "seeds", "trained, M", "MB a language", *(["GMACs"] if counted else [])]
    head += [f"{language} WER %" for language in languages]
    head += ["macro WER %", "macro CER %", *(WHOLE[split] for split in rest)]
    rows, seeds = [], 1
    for variant, splits in methods_of(runs).items():
        inside = splits.get(main, [])
        seeds = max(seeds, len(inside))
        details = inside[0].details if inside else {}
        trained = details.get("trained_parameters")
        weight = details.get("megabytes_per_language", details.get("megabytes"))
        cells = [variant, str(len(inside)), "–" if trained is None else f"{trained / 1e6:.2f}"]
        cells.append("–" if weight is None else f"{weight:.1f}")
        cells += [_spread([run.macs_g for run in inside][:1], 2)] if counted else []
        cells += [_spread([run.details["languages"][a]["wer_percent"] for run in inside]) for a in languages]
        cells += [_spread([run.details[f"macro_{key}"] for run in inside]) for key in ("wer_percent", "cer_percent")]
        cells += [_spread([run.wer_percent for run in splits.get(split, [])]) for split in rest]
        rows.append(cells)
    spread = " ± is half the distance between two seeds." if seeds > 1 else ""
    return f"Real speech; {sizes}.{spread}\n\n{markdown_table(head, rows)}"


def page_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- experts NAME -->`, from the results in `experts/NAME`.

    Raises
    ------
    UserError
        If there are no such results.
    """
    folder = results_folder / "experts" / name
    runs = load_runs(folder)
    if not any(run.split in SPLITS for run in runs):
        raise UserError(f"table '{name}' is requested, but there are no results on {', '.join(SPLITS)} in {folder}")
    return experts_table(runs)


def draw_all(results_folder: Path) -> list[Path]:
    """Plot the gates for every folder in `experts`; return the paths of the figures."""
    folders = sorted((results_folder / "experts").glob("*/"))
    plots = results_folder / "plots"
    drawn = [draw_gates(load_runs(folder), plots / f"gates-{folder.name}.png") for folder in folders]
    return [path for path in drawn if path is not None]


def _place(layer: str) -> tuple[int, int]:
    """Return the sort key of a layer such as `encoder.0`."""
    side, _, number = layer.partition(".")
    return SIDES.index(side), int(number)


def draw_gates(runs: list[Result], path: Path) -> Path | None:
    """Plot the share of frames and tokens handled by experts, by layer and method.

    Methods whose experts handled everything are named in a sentence instead. Return None if nothing is left to draw.
    """
    usage: dict[str, dict[str, float]] = {}
    for variant, splits in methods_of(runs).items():
        inside = [run for split in BY_LANGUAGE for run in splits.get(split, [])]
        found: list[dict[str, Any]] = [run.details["gate_usage"] for run in inside if "gate_usage" in run.details]
        for run, shares in enumerate(found):
            usage[variant + (f", run {run + 1}" if len(found) > 1 else "")] = shares
    layers = sorted({layer for shares in usage.values() for layer in shares}, key=_place)
    full = [name for name, shares in usage.items() if min(shares.values()) > 0.995]
    usage = {name: shares for name, shares in usage.items() if name not in full}
    if not usage:
        return None
    values = [[100 * shares.get(layer, math.nan) for layer in layers] for shares in usage.values()]
    figure, ax = pyplot.subplots(figsize=(3.2 + 0.8 * len(layers), 2.6 + 0.42 * len(usage)), layout="constrained")
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text, colour = ("–", "black") if math.isnan(value) else (f"{value:.0f}", "white" if value < 60 else "black")
            ax.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    names = [f"{SIDES[side]} {number + 1}" for side, number in map(_place, layers)]
    ax.set_xticks(range(len(layers)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(usage)), list(usage))
    figure.colorbar(image, label="% of frames or tokens")
    ax.set_title("Share of real speech handled by experts, by layer", fontsize=11)
    if full:
        said = "Not drawn, since experts handled every frame and token in all layers: " + "; ".join(full) + "."
        ax.set_xlabel("\n".join(textwrap.wrap(said, 10 * len(layers) + 20)), fontsize=8, loc="left")
    return save_figure(figure, path)
