"""Plots of WER against MACs and CPU time, with the Pareto front."""

from __future__ import annotations

import string
import textwrap
from pathlib import Path
from typing import Any

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.figures import pyplot
from efficient_asr.reporting.results import check_comparable
from efficient_asr.utils.technique import techniques

MOST_LABELS = 6  # maximum number of points to label; with more, only the Pareto front gets letters


def plot_name(name: str) -> str:
    """Return the file name of a benchmark's plot."""
    return name.replace("/", "_") + ".png"


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points (cost, error), by increasing cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def plot_group(result: Result) -> str:
    """Return the colour group of a result: its technique, or a group that the technique declares."""
    if result.technique == "none":
        return "baseline"
    names = result.technique.split(" + ")
    declared = (technique for technique in techniques() if technique.name in names and technique.plot_groups)
    suffixes = "".join(technique.load(technique.plot_groups)(result) for technique in declared)
    return result.technique.replace("_", " ") + suffixes


def plot(name: str, results: list[Result], path: Path) -> Path:
    """Plot WER against MACs and against CPU time, and mark the Pareto front."""
    check_comparable(name, results)
    many = len(results) > MOST_LABELS
    size = (13, 5.2) if many else (11, 4.2)
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    costs: list[tuple[str, Any]] = [
        ("GMACs per utterance", lambda r: r.macs_g),
        ("CPU seconds for the split, batch 1", lambda r: (r.runtime("cpu") or {}).get("runtime_s")),
    ]
    families = sorted({plot_group(r) for r in results}, key=lambda f: (f != "baseline", f))
    styles = {family: (f"C{i % 10}", "osD^vP"[i % 6]) for i, family in enumerate(families)}
    for ax, (label, cost) in zip(axes, costs, strict=True):
        shown = [(cost(r), r.wer_percent, r) for r in results if cost(r) is not None and r.wer_percent is not None]
        shown.sort(key=lambda point: point[0])
        for i, (x, y, r) in enumerate(shown):
            low, high = r.wer_ci95_percent or (y, y)
            colour, marker = styles[plot_group(r)]
            bars = [[max(0, y - low)], [max(0, high - y)]]
            ax.errorbar(x, y, bars, fmt=marker, color=colour, capsize=2, elinewidth=0.4 if many else 1.5, alpha=0.9)
            if not many:
                place = (-12, -16 - 11 * (i % 4))
                ax.annotate(r.variant, (x, y), xytext=place, textcoords="offset points", fontsize=8)
        front = [shown[i] for i in pareto_front([(x, y) for x, y, _ in shown])]
        ax.plot([x for x, _, _ in front], [y for _, y, _ in front], "--", color="0.5", zorder=0)
        names = []
        for letter, (x, y, r) in zip(string.ascii_lowercase, front if many else (), strict=False):
            ax.annotate(letter, (x, y), xytext=(-9, -13), textcoords="offset points", fontsize=9, fontweight="bold")
            names.append(f"{letter} {r.variant}")
        ax.set_xlabel(
            "\n".join([label, *(textwrap.wrap("Pareto front: " + ", ".join(names), 66) if names else ())]), fontsize=9
        )
        ax.set_xlim(left=None if many else 0)
        ax.grid(alpha=0.3)
    for family, (colour, marker) in styles.items():
        axes[0].plot([], [], marker, color=colour, label=family)
    axes[0].plot([], [], "--", color="0.5", label="Pareto front")
    axes[0].set_ylabel("WER %")
    if many:
        figure.legend(loc="outside right upper", fontsize=8)
    else:
        axes[0].set_ylim(0, 1.08 * axes[0].get_ylim()[1])
        axes[0].legend(fontsize=8)
    kind = "synthetic speech" if results[0].synthetic else "real speech"
    figure.suptitle(f"{name} ({kind}); bars: 95 % bootstrap interval", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
