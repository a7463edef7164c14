"""Tables and figures of `recipes/decider/compare.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efficient_asr.reporting.figures import COLOURS, pyplot, save_figure
from efficient_asr.reporting.tables import markdown_table, show
from efficient_asr.utils.errors import UserError

FORMER_KEYS = {"gain_closed": "pgr", "gain_closed_in_time": "pgr_in_time", "gain_closed_ci95": "pgr_ci95"}


def by_merit(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the routers, sorted by performance gap recovered (PGR), highest first."""
    return sorted(result["routers"].items(), key=lambda item: -(item[1]["pgr"] or 0.0))


def processor(result: dict[str, Any]) -> str:
    """Return what the times are of."""
    return "CPU" if result.get("device", "cpu") == "cpu" else "GPU"


def routing_table(result: dict[str, Any]) -> str:
    """Format tables of single models, oracle and routers, over all test sets and per test set."""
    small, large = result["pair"]
    models = result["models"]
    every, splits = models["all"], [name for name in models if name != "all"]
    kind = "**synthetic speech**" if result["synthetic"] else "real speech"
    lines = [
        f"`{result['corpus']}`, {small}/{large}: {kind}, {every['utterances']} utterances, {every['reference_words']:.0f} words "
        f"in {len(splits)} test sets.",
        "",
    ]
    head = ["router", "PGR, % [95 %]", "in time, %", "AUC"]
    head += [
        f"at {large}'s dev WER: to {large}, %",
        "WER %",
        "GMACs",
        f"{processor(result)} s/utt",
        "at a dev share of 30 %: WER %",
        "GMACs",
    ]
    rows = []
    for name, router in by_merit(result):
        ci = router["pgr_ci95"]
        points = {key: point for point in router["points"] for key in point if key.startswith("calibrate")}
        matched = points["calibrate_wer_percent"]
        third = next(p for p in router["points"] if p.get("calibrate_large_share") == 0.3)
        rows.append([
            name, show(router["pgr"], 0, 100) + (f" [{100 * ci[0]:.0f}, {100 * ci[1]:.0f}]" if ci else ""),
            show(router["pgr_in_time"], 0, 100), show(router["auc"], 3), show(matched["large_model_rate"], 0, 100),
            *(show(matched[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1), ("time_s", 2))),
            *(show(third[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1))),
        ])  # fmt: skip
    for name in ("small", "large", "oracle"):
        entry = every[name]
        rate = {"small": 0.0, "large": 1.0}.get(name, entry.get("large_model_rate"))
        label = {"small": f"always {small}", "large": f"always {large}"}.get(name, name)
        cells = [show(entry[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1), ("time_s", 2))]
        rows.append([label, "100" if name == "oracle" else "0", "–", "–", show(rate, 0, 100), *cells, "–", "–"])
    lines += [markdown_table(head, rows), ""]
    head = ["test set", "utterances", f"{small} WER %", f"{large} WER %", "oracle WER %", "oracle share, %"]
    best = [name for name, _ in by_merit(result)]
    head += [f"{name}: PGR, %" for name in best]
    rows = []
    for split in splits:
        entry = models[split]
        closed = [show(result["routers"][name]["splits"][split]["pgr"], 0, 100) for name in best]
        cells = [show(entry[name]["wer_percent"]) for name in ("small", "large", "oracle")]
        share = show(entry["oracle"]["large_model_rate"], 0, 100)
        rows.append([split, str(entry["utterances"]), *cells, share, *closed])
    return "\n".join([*lines, markdown_table(head, rows)])


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a file written by `recipes/decider/compare.py`, including those of former versions.

    Raises
    ------
    UserError
        If the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"routing table '{path.stem}' is requested, but {path} does not exist")

    def current(entry: dict[str, Any]) -> dict[str, Any]:
        return {FORMER_KEYS.get(key, key): value for key, value in entry.items()}

    return json.loads(path.read_text(encoding="utf-8"), object_hook=current)


def page_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- routing NAME -->`, from `routing/NAME.json` in the results."""
    return routing_table(read_comparison(results_folder / "routing" / f"{name}.json"))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Plot WER over all test sets against mean MACs and mean CPU time for routers, random choice and oracle."""
    small, large = result["pair"]
    every = result["models"]["all"]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.4), sharey=True, layout="constrained")
    labels = {
        "macs_g": "mean GMACs of an utterance",
        "time_s": f"mean {processor(result)} seconds of an utterance, batch 1",
    }
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        ends = [(every[name][key], every[name]["wer_percent"]) for name in ("small", "large")]
        ax.plot(*zip(*ends, strict=True), "--", color="0.5", label="random, every rate")
        ax.plot(*zip(*every["oracle"]["curves"][key], strict=True), "-", color="black", linewidth=1.5, label="oracle")
        for i, (name, router) in enumerate(by_merit(result)):
            style = ":" if name.startswith("rule") else "-"
            colour = COLOURS[1 + i % (len(COLOURS) - 1)]  # black is the oracle's
            closed = "" if router["pgr"] is None else f" ({100 * router['pgr']:.0f} %)"
            points = router["curves"][key]
            ax.plot(*zip(*points, strict=True), style, color=colour, label=name + closed, linewidth=1.6)
        for (x, y), name, below in zip(ends, (f"always {small}", f"always {large}"), (False, True), strict=True):
            ax.plot(x, y, "o", color="0.2", zorder=5)
            ax.annotate(
                name, (x, y), xytext=(0, -26 if below else 30), textcoords="offset points", fontsize=9, zorder=6,
                ha="center" if below else "left", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
                arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.7},
            )  # fmt: skip
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("WER % over all test sets")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside right upper",
        fontsize=8,
        title="(PGR at equal MACs, mean of\nall seeds; curves: first seed)",
    )
    kind = "synthetic speech" if result["synthetic"] else "real speech"
    figure.suptitle(
        f"{result['corpus']}: {small} or {large}, chosen for each utterance ({kind}, {every['utterances']} utterances)",
        fontsize=10,
    )
    return save_figure(figure, path)
