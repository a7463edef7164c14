"""Tables and figures of models that were compared by `efficient-asr compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficient_asr.reporting.figures import COLOURS, MARKERS, pyplot, save_figure
from efficient_asr.reporting.results import read_json
from efficient_asr.reporting.tables import markdown_table, show, show_difference
from efficient_asr.utils.technique import techniques


def comparison_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- compared NAME -->`, from `NAME.json` in the folder of results."""
    return table_of(read_json(results_folder / f"{name}.json", "efficient-asr compare"))


def table_of(result: dict[str, Any]) -> str:
    """Return the table of a comparison, with a line about its conditions; columns that would say nothing are left out."""
    systems, timing = result["systems"], result.get("timing", {"systems": {}})
    first = next(iter(systems))
    corpora = [corpus for corpus in systems[first]["corpora"] if corpus != "all"]
    about = systems[first]["corpora"]["all"]
    normaliser = ", ".join(result.get("normalisers", ["whisper"])).replace("whisper", "Whisper's own")
    kind = "**Synthetic speech**" if result.get("synthetic") else "Real speech"
    title = (
        f"{kind}, {about['utterances']} utterances, {about['words']} words; {normaliser} normaliser; difference from the "
        "first row with a paired bootstrap interval."
    )
    if timing["systems"]:
        title += (
            f" MACs and times of {timing['utterances']} utterances ({timing['audio_s'] / 60:.1f} min), medians of "
            f"{timing['rounds']} interleaved rounds, {timing['cpu']}, {timing['threads']} threads."
        )
    columns = {"system": list(systems), **_numbers(systems, corpora, first), **_times(systems, timing)}
    if not any(entry["corpora"]["all"]["repeated_5grams"] for entry in systems.values()):
        del columns["repeated 5-grams"]
    kept = {head: cells for head, cells in columns.items() if {*cells} != {"–"}}
    return f"{title}\n\n{markdown_table(list(kept), [list(row) for row in zip(*kept.values(), strict=True)])}"


def _numbers(systems: dict[str, Any], corpora: list[str], first: str) -> dict[str, list[str]]:
    """Return the columns of what was counted, by heading."""
    every = [entry["corpora"]["all"] for entry in systems.values()]
    columns = {
        "M parameters": [show(entry["parameters"], 0, 1e-6) for entry in systems.values()],
        **{
            column.head: [show(entry.get("details", {}).get(column.entry), column.digits) for entry in systems.values()]
            for technique in techniques()
            for column in technique.columns
        },
        "WER %": [show(each["wer_percent"]) for each in every],
        "difference [95 %]": [show_difference(each, name == first) for name, each in zip(systems, every, strict=True)],
    }
    for corpus in corpora if len(corpora) > 1 else ():
        columns[f"{corpus} WER %"] = [show(entry["corpora"][corpus]["wer_percent"]) for entry in systems.values()]
    columns["insertions %"] = [show(each["insertions_percent"]) for each in every]
    columns["repeated 5-grams"] = [str(each["repeated_5grams"]) for each in every]
    macs = [entry["macs_g"] for entry in systems.values()]
    digits = 1 if max((each for each in macs if each is not None), default=0) >= 10 else 3
    columns["GMACs"] = [show(each, digits) for each in macs]
    return columns


def _times(systems: dict[str, Any], timing: dict[str, Any]) -> dict[str, list[str]]:
    """Return the columns of what was timed, by heading."""
    columns: dict[str, list[str]] = {"rtfx, batch 1": [], "rtfx, batch 8": [], "tokens/s, batch 1": []}
    for system in systems:
        times = timing["systems"].get(system, {})
        own = [times.get(str(batch), times.get(batch, {})) for batch in (1, 8)]
        for each, cells in zip(own, columns.values(), strict=False):
            seconds = each.get("seconds")
            cells.append(show(timing["audio_s"] / seconds if seconds else None, 1))
        columns["tokens/s, batch 1"].append(show(own[0].get("tokens_per_s"), 0))
    return columns


def draw_comparison(result: dict[str, Any], path: Path) -> Path | None:
    """Plot WER against rtfx of all systems, one panel a batch size; return the path, or None if nothing was timed.

    Systems whose names are the same up to the first comma have one colour; what follows the comma chooses the marker.
    """
    timing = result.get("timing")
    if not timing:
        return None
    names = list(result["systems"])
    models = list(dict.fromkeys(name.partition(",")[0] for name in names))
    forms = list(dict.fromkeys(name.partition(",")[2].strip() for name in names))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.6), sharey=True, layout="constrained")
    for axis, batch in zip(axes, (1, 8), strict=True):
        for name in names:
            times = timing["systems"][name]
            seconds = times.get(str(batch), times.get(batch))["seconds"]
            model, _, form = name.partition(",")
            place = forms.index(form.strip())
            wer_percent = result["systems"][name]["corpora"]["all"]["wer_percent"]
            axis.plot(
                timing["audio_s"] / seconds, wer_percent, MARKERS[place % len(MARKERS)], markersize=8, label=name,
                color=COLOURS[models.index(model) % len(COLOURS)], markerfacecolor="none" if place >= len(MARKERS) else None,
            )  # fmt: skip
        axis.set(
            xlabel="seconds of audio per second (rtfx)", title=f"batch {batch}", xlim=(0, 1.05 * axis.dataLim.xmax)
        )
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="WER %", ylim=(0, 1.05 * max(axis.dataLim.ymax for axis in axes)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    about = result["systems"][names[0]]["corpora"]["all"]
    kind = "synthetic" if result.get("synthetic") else "real"
    figure.suptitle(
        f"{kind} speech: WER of {about['utterances']} utterances, speed on {timing['utterances']} of them; {timing['cpu']}, "
        f"{timing['threads']} threads"
    )
    return save_figure(figure, path)
