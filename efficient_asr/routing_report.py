"""Tables and pictures of `scripts/compare_routers.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from efficient_asr.errors import UserError
from efficient_asr.report import markdown_table

MARKER = re.compile(r"(<!-- routing (?P<name>\S+) -->\n).*?(?P<end><!-- /routing -->)", re.DOTALL)


def _show(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


def by_merit(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the routers, the one that closes most first."""
    return sorted(result["routers"].items(), key=lambda item: -(item[1]["gain_closed"] or 0.0))


def routing_table(result: dict[str, Any]) -> str:
    """Draw single models, oracle and routers over all test sets, and on each."""
    small, large = result["pair"]
    models = result["models"]
    every, splits = models["all"], [name for name in models if name != "all"]
    kind = "**synthetic speech**" if result["synthetic"] else "real speech"
    lines = [
        f"`{result['corpus']}`, {small}/{large}: {kind}, {every['utterances']} utterances, {every['reference_words']:.0f} words "
        f"in {len(splits)} test sets.",
        "",
    ]
    head = ["router", "gain closed, % [95 %]", "in time, %", "AUC"]
    head += [
        f"at {large}'s dev WER: to {large}, %",
        "WER %",
        "GMACs",
        "CPU s/utt",
        "at a dev share of 30 %: WER %",
        "GMACs",
    ]
    rows = []
    for name, router in by_merit(result):
        ci = router["gain_closed_ci95"]
        points = {key: point for point in router["points"] for key in point if key.startswith("calibrate")}
        matched = points["calibrate_wer_percent"]
        third = next(p for p in router["points"] if p.get("calibrate_large_share") == 0.3)
        rows.append([
            name, _show(router["gain_closed"], 0, 100) + (f" [{100 * ci[0]:.0f}, {100 * ci[1]:.0f}]" if ci else ""),
            _show(router["gain_closed_in_time"], 0, 100), _show(router["auc"], 3), _show(matched["large_model_rate"], 0, 100),
            *(_show(matched[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1), ("time_s", 2))),
            *(_show(third[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1))),
        ])  # fmt: skip
    for name in ("small", "large", "oracle"):
        entry = every[name]
        rate = {"small": 0.0, "large": 1.0}.get(name, entry.get("large_model_rate"))
        label = {"small": f"always {small}", "large": f"always {large}"}.get(name, name)
        cells = [_show(entry[key], digits) for key, digits in (("wer_percent", 2), ("macs_g", 1), ("time_s", 2))]
        rows.append([label, "100" if name == "oracle" else "0", "–", "–", _show(rate, 0, 100), *cells, "–", "–"])
    lines += [markdown_table(head, rows), ""]
    head = ["test set", "utterances", f"{small} WER %", f"{large} WER %", "oracle WER %", "oracle share, %"]
    best = [name for name, _ in by_merit(result)]
    head += [f"{name}: gain closed, %" for name in best]
    rows = []
    for split in splits:
        entry = models[split]
        closed = [_show(result["routers"][name]["splits"][split]["gain_closed"], 0, 100) for name in best]
        cells = [_show(entry[name]["wer_percent"]) for name in ("small", "large", "oracle")]
        share = _show(entry["oracle"]["large_model_rate"], 0, 100)
        rows.append([split, str(entry["utterances"]), *cells, share, *closed])
    return "\n".join([*lines, markdown_table(head, rows)])


def render_routing(text: str, folder: Path) -> str:
    """Fill every `<!-- routing NAME -->` ... `<!-- /routing -->` of a Markdown text from `<folder>/NAME.json`.

    Raises
    ------
    UserError
        Where there is no such file.
    """

    def fill(match: re.Match) -> str:
        path = folder / f"{match['name']}.json"
        if not path.is_file():
            raise UserError(f"a routing table '{match['name']}' is asked for, but there is no {path}")
        return match[1] + routing_table(json.loads(path.read_text(encoding="utf-8"))) + "\n" + match["end"]

    return MARKER.sub(fill, text)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw WER over all test sets against mean MACs and mean CPU time: routers between random and oracle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    small, large = result["pair"]
    every = result["models"]["all"]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.4), sharey=True, layout="constrained")
    labels = {"macs_g": "mean GMACs of an utterance", "time_s": "mean CPU seconds of an utterance, batch 1"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        ends = [(every[name][key], every[name]["wer_percent"]) for name in ("small", "large")]
        ax.plot(*zip(*ends, strict=True), "--", color="0.5", label="random, every rate")
        ax.plot(*zip(*every["oracle"]["curves"][key], strict=True), "-", color="black", linewidth=1.5, label="oracle")
        for i, (name, router) in enumerate(by_merit(result)):
            style = ":" if name.startswith("rule") else "-"
            closed = "" if router["gain_closed"] is None else f" ({100 * router['gain_closed']:.0f} %)"
            points = router["curves"][key]
            ax.plot(*zip(*points, strict=True), style, color=f"C{i % 10}", label=name + closed, linewidth=1.6)
        for (x, y), name, place in zip(ends, (f"always {small}", f"always {large}"), ((6, 4), (-8, -14)), strict=True):
            ax.plot(x, y, "o", color="0.2")
            ax.annotate(name, (x, y), xytext=place, textcoords="offset points", fontsize=9)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("WER % over all test sets")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, title="(gain closed at equal MACs)")
    kind = "synthetic speech" if result["synthetic"] else "real speech"
    figure.suptitle(
        f"{result['corpus']}: {small} or {large}, chosen for each utterance ({kind}, {every['utterances']} utterances)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
