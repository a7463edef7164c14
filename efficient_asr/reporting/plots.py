"""Plots of WER against each cost, with the Pareto fronts and a numbered list of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from adjustText import adjust_text

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.figures import COLOURS, MARKERS, pyplot, save_figure
from efficient_asr.reporting.results import check_comparable, machine_of
from efficient_asr.reporting.tables import row_name
from efficient_asr.utils.technique import techniques

PANEL_WIDTH, LIST_WIDTH, LINE_HEIGHT = 4.8, 3.7, 0.19  # inches
MOST_BARS = 15  # rows up to which 95 % intervals are drawn


def plot_name(name: str) -> str:
    """Return the file name of a benchmark's plot."""
    return name.replace("/", "_").replace(" ", "_").translate({ord(c): None for c in "(),"}) + ".png"


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


Cost = tuple[str, Callable[[Result], float | None]]


def _seconds(device: str, name: str, results: list[Result]) -> Cost:
    """Return the label and the seconds at batch 1 of results timed on one machine: the one of the most results."""
    entries = [entry for result in results if (entry := result.runtime(device)) is not None]
    machines = Counter(map(machine_of, entries)).most_common()
    label = f"{name} seconds for the split, batch 1"
    if len(machines) > 1:
        label += f"\nonly rows timed on {machines[0][0]}"

    def seconds(result: Result) -> float | None:
        entry = result.runtime(device)
        return entry["runtime_s"] if entry is not None and machine_of(entry) == machines[0][0] else None

    return label, seconds


def _costs(results: list[Result]) -> list[Cost]:
    """Return the label and the value of each cost that was measured."""
    found: list[Cost] = [
        ("GMACs per utterance", lambda result: result.macs_g),
        _seconds("cpu", "CPU", results),
        _seconds("cuda", "GPU", results),
    ]
    return [(label, cost) for label, cost in found if any(cost(r) is not None for r in results)] or found[:1]


def plot(name: str, results: list[Result], path: Path) -> Path:
    """Plot WER against every cost that was measured, one panel each; a row has the same number in all panels and in the list.

    Every technique has its own colour and Pareto front; the front of all rows is dashed. Writes PNG, SVG and PDF.

    Arguments
    ---------
    name : str
        `corpus/split`, for the title.
    results : list of Result
        Results of one benchmark.
    path : Path
        The PNG file.
    """
    check_comparable(name, results)
    results = [result for result in results if result.wer_percent is not None]
    groups = sorted({plot_group(r) for r in results}, key=lambda group: (group != "baseline", group))
    rows = sorted(results, key=lambda r: (groups.index(plot_group(r)), r.macs_g or 0.0, r.wer_percent))
    costs = _costs(rows)
    height = max(4.4, 0.9 + LINE_HEIGHT * (len(rows) + len(groups) + 3))
    figure, axes = pyplot.subplots(
        1, len(costs) + 1, figsize=(PANEL_WIDTH * len(costs) + LIST_WIDTH, height), layout="constrained",
        width_ratios=[*[PANEL_WIDTH] * len(costs), LIST_WIDTH],
    )  # fmt: skip
    kinds = list(dict.fromkeys(r.technique for r in rows))
    colours = {plot_group(r): COLOURS[kinds.index(r.technique) % len(COLOURS)] for r in rows}
    styles = {group: (colours[group], MARKERS[i % len(MARKERS)]) for i, group in enumerate(groups)}
    for ax, (label, cost) in zip(axes, costs, strict=False):
        _draw_panel(ax, rows, cost, styles)
        ax.set_xlabel(label)
        ax.sharey(axes[0])
    if results and axes[0].get_ylim()[0] < 0:
        axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("WER %" + (", bars: 95 % bootstrap interval" if len(rows) <= MOST_BARS else ""))
    _draw_list(axes[-1], rows, styles, height)
    kind = "synthetic speech" if results and results[0].synthetic else "real speech"
    figure.suptitle(f"{name} ({kind}, {results[0].utterances if results else 0} utterances)", fontsize=11)
    return save_figure(figure, path)


def _draw_panel(
    ax: Any, rows: list[Result], cost: Callable[[Result], float | None], styles: dict[str, tuple[str, str]]
) -> None:
    """Draw the points, their numbers, and the Pareto fronts of one cost."""
    points = [(i, cost(r), r.wer_percent, plot_group(r)) for i, r in enumerate(rows) if cost(r) is not None]
    for group, (colour, marker) in styles.items():
        own = [(x, y) for _, x, y, other in points if other == group]
        ax.plot(*zip(*own, strict=True), marker, color=colour, markersize=5, zorder=3) if own else None
    for colour in dict.fromkeys(colour for colour, _ in styles.values()):
        own = [(x, y) for _, x, y, group in points if styles[group][0] == colour]
        front = [own[i] for i in pareto_front(own)]
        ax.plot([x for x, _ in front], [y for _, y in front], "-", color=colour, linewidth=1, alpha=0.7)
    for i, x, y, group in points if len(rows) <= MOST_BARS else ():
        low, high = rows[i].wer_ci95_percent or (y, y)
        ax.errorbar(x, y, [[max(0, y - low)], [max(0, high - y)]], color=styles[group][0], elinewidth=0.8, alpha=0.5)
    front = pareto_front([(x, y) for _, x, y, _ in points])
    ax.plot([points[i][1] for i in front], [points[i][2] for i in front], "--", color="0.6", linewidth=2, zorder=0)
    ax.margins(0.09)
    ax.grid(alpha=0.25)
    texts = [ax.text(x, y, str(i + 1), color=styles[group][0], fontsize=8, zorder=4) for i, x, y, group in points]
    if texts:
        np.random.seed(0)  # noqa: NPY002  adjustText draws from the global generator
        xs, ys = [x for _, x, _, _ in points], [y for _, _, y, _ in points]
        line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5}
        adjust_text(texts, xs, ys, ax=ax, arrowprops=line, expand=(1.5, 1.8), ensure_inside_axes=True)


def _draw_list(ax: Any, rows: list[Result], styles: dict[str, tuple[str, str]], height: float) -> None:
    """Draw the numbered list of all rows, by technique, with their WER."""
    ax.set_axis_off()
    step = LINE_HEIGHT / (height - 0.9)
    y = 1.0
    for group, (colour, marker) in styles.items():
        ax.plot([0.02], [y], marker, color=colour, transform=ax.transAxes, clip_on=False, markersize=5)
        ax.text(0.06, y, group, transform=ax.transAxes, va="center", fontsize=9, fontweight="bold", color=colour)
        y -= step
        for i, result in enumerate(rows):
            if plot_group(result) == group:
                ax.text(0.07, y, str(i + 1), transform=ax.transAxes, va="center", ha="right", fontsize=8, color=colour)
                ax.text(0.09, y, row_name(result, short=True), transform=ax.transAxes, va="center", fontsize=8)
                ax.text(
                    1.0, y, f"{result.wer_percent:.2f} %", transform=ax.transAxes, va="center", ha="right", fontsize=8
                )
                y -= step
    ax.plot([0.0, 0.04], [y, y], "--", color="0.6", linewidth=2, transform=ax.transAxes, clip_on=False)
    ax.text(0.06, y, "Pareto front of all rows", transform=ax.transAxes, va="center", fontsize=8)
