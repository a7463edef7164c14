"""Tables of the silence cache against the padded model, and of this project beside other programs; figures of both."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from efficient_asr.reporting.figures import COLOURS, pyplot, save_figure
from efficient_asr.reporting.results import read_json
from efficient_asr.reporting.tables import markdown_table, show, show_difference

REFERENCE = "faster-whisper int8"


def comparison_table(name: str, results_folder: Path, folder: str = "silence_cache") -> str:
    """Return the table for the marker `<!-- silence_cache NAME -->`, from `silence_cache/NAME.json` (or another folder)."""
    result = read_json(results_folder / folder / f"{name}.json", "recipes/silence_cache/compare.py")
    found, model = result["variants"], result.get("model", f"whisper-{name}")
    corpora = [corpus for corpus, own in found["padded"].items() if isinstance(own, dict) and "words" in own]
    corpora.remove("all")
    guarded = any("encoded_again_percent" in entry.get("summary", {}) for entry in found.values())
    about = found["padded"]["all"]
    rows = []
    for variant, entry in found.items():
        every = entry["all"]
        difference = show_difference(every, variant == "padded")
        same = 100 * every["identical"] / every["utterances"]
        each = [show(entry[corpus]["wer_percent"]) for corpus in corpora]
        again = [show(entry.get("summary", {}).get("encoded_again_percent"), 0)] if guarded else []
        rows.append([variant, show(every["wer_percent"]), difference, show(same, 0), *again, *each])
    recordings = any("recordings" in variant for variant in found)
    calibrated = " Calibrated on noise, or on 16 recordings." if recordings else ""
    head = [
        "real silence, groups, calibration" if recordings else "variant",
        "WER %",
        "difference [95 %]",
        "identical %",
        *(["encoded again %"] if guarded else []),
        *(f"{c} WER %" for c in corpora),
    ]
    counts = f"{about['utterances']} utterances, {about['words']} words"
    return (
        f"{model}, real speech, {counts}; Whisper's own normalisers by language; difference from the padded model with a "
        f"paired bootstrap interval.{calibrated}\n\n{markdown_table(head, rows)}"
    )


def median_ratio(reference_s: list[float], seconds: list[float]) -> float:
    """Return the median over rounds of how many times as fast as a reference a system was in the same round."""
    return statistics.median(a / b for a, b in zip(reference_s, seconds, strict=True))


def peers_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- peers NAME -->`, from `peers/NAME.json`."""
    result = read_json(results_folder / "peers" / f"{name}.json", "scripts/benchmark_peers.py")
    rows, sentences = [], []
    batches = sorted({row["batch_size"] for row in result["rows"]})
    labels = list(dict.fromkeys(row["label"] for row in result["rows"]))
    by_place = {(row["label"], row["batch_size"]): row for row in result["rows"]}
    for label in labels:
        cells = [label]
        for batch in batches:
            row, peer = by_place.get((label, batch)), by_place.get((REFERENCE, batch))
            ratio = median_ratio(peer["seconds"], row["seconds"]) if row and peer else None
            cells += ["–"] * 5 if row is None else [
                show(row["wer_percent"]), show(row["rtfx"], 1), show(row["ratio_to_ours"]), show(ratio),
                show(row["peak_memory_bytes"] / 2**20, 0),
            ]  # fmt: skip
        rows.append(cells)
    head = ["system"]
    for batch in batches:
        head += [f"WER %, batch {batch}", "rtfx", "× ours", f"× {REFERENCE}", "peak MB"]
    first, about = result["rows"][0], result["provenance"]
    sentences.append(
        f"{first['model']}, {' and '.join(first['audio'])}: {first['utterances']} utterances, {first['audio_s'] / 60:.1f} min, "
        f"real speech; {about['cpu']}, {about['threads']} threads; {first['rounds']} interleaved rounds, medians; ratios are "
        "medians of those within a round."
    )
    missing = sorted({label.partition(", batch")[0] for label in result["missing"]})
    if missing:
        sentences.append(f"Not installed, or without batches: {', '.join(missing)}.")
    return " ".join(sentences) + "\n\n" + markdown_table(head, rows)


def draw_all(results_folder: Path) -> list[Path]:
    """Draw WER against speed for every file in `peers`, and the curves of every model; return the paths of the figures."""
    drawn = [draw_peers(path, results_folder / "plots") for path in sorted((results_folder / "peers").glob("*.json"))]
    found = sorted(
        path.stem.removeprefix("paddings-") for path in (results_folder / "silence_cache").glob("paddings-*.json")
    )
    whole = [name for name in found if (results_folder / "silence_cache" / f"lengths-{name}.json").is_file()]
    return drawn + [draw_curves(name, results_folder) for name in whole]


def draw_curves(name: str, results_folder: Path) -> Path:
    """Plot WER and time against the real silence, and the speed-up against the length of the audio."""
    folder = results_folder / "silence_cache"
    compared, paddings, lengths = (
        read_json(folder / f"{file}.json", f"recipes/silence_cache/{script}.py")
        for file, script in ((name, "compare"), (f"paddings-{name}", "lengths"), (f"lengths-{name}", "lengths"))
    )
    figure, (words, seconds, gains) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    points = []
    for variant, entry in compared["variants"].items():
        if found := re.fullmatch(r"([\d.]+) s, groups of 4, recordings", variant):
            points.append((float(found[1]), entry["all"]["difference_percent"], entry["all"]["ci95_percent"]))
    places, means, bounds = zip(*sorted(points), strict=True)
    spans = [[abs(mean - bound[side]) for mean, bound in zip(means, bounds, strict=True)] for side in (0, 1)]
    words.errorbar(places, means, yerr=spans, marker="o", capsize=3, color=COLOURS[0])
    words.axhline(0, color="grey", linewidth=1)
    words.set(xlabel="real silence, s", ylabel="WER against the padded model, points", title="words (groups of 4)")
    (row,) = paddings["rows"]
    times = {float(key.removeprefix("cache, ")[:-2]): value for key, value in row["seconds"].items() if key != "padded"}
    seconds.plot(list(times), list(times.values()), "o-", color=COLOURS[0], label="silence cache")
    seconds.axhline(row["seconds"]["padded"], color=COLOURS[1], label="padded")
    seconds.set(
        xlabel="real silence, s", ylabel=f"s for {row['audio_s']:g} s of audio, batch 1", title="time", ylim=(0, None)
    )
    for number, form in enumerate(list(lengths["rows"][0]["seconds"])[1:]):
        gain = [each["seconds"]["padded"] / each["seconds"][form] for each in lengths["rows"]]
        gains.plot([each["audio_s"] for each in lengths["rows"]], gain, "o-", color=COLOURS[number], label=form)
    gains.set(
        xlabel="length of the audio, s", ylabel="times the padded model's speed", title="speed-up", ylim=(0, None)
    )
    for axis in (words, seconds, gains):
        axis.grid(alpha=0.3)
    for axis in (seconds, gains):
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"whisper-{name} with the silence cache, CPU")
    return save_figure(figure, results_folder / "plots" / f"silence_cache-{name}.png")


def draw_peers(path: Path, folder: Path) -> Path:
    """Plot WER against rtfx of all systems in a file, one panel a batch size."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    batches = sorted({row["batch_size"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(4.2 * len(batches) + 2.6, 4), sharey=True, layout="constrained"
    )
    for axis, batch in zip([axes] if len(batches) == 1 else axes, batches, strict=True):
        for row in (row for row in rows if row["batch_size"] == batch):
            number = labels.index(row["label"])
            own = row["system"] == "efficient_asr"
            axis.plot(
                row["rtfx"], row["wer_percent"], "o^v"[number // len(COLOURS)] if own else "s", markersize=8, label=row["label"],
                color=COLOURS[number % len(COLOURS)], markerfacecolor=None if own else "none", markeredgewidth=2,
            )  # fmt: skip
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("seconds of audio per second (rtfx)")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("WER %")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"whisper-{path.stem} on the CPU")
    return save_figure(figure, folder / f"peers-{path.stem}.png")


def distances_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- distances NAME -->`, from `silence_cache/distances-NAME.json`."""
    found = read_json(results_folder / "silence_cache" / f"distances-{name}.json", "recipes/silence_cache/distances.py")
    places = list(found["layers"][0]["relative_percent"])
    rows = [
        [str(entry["layer"]), *(show(entry["relative_percent"][place], 1) for place in places)]
        for entry in found["layers"]
    ]
    return (
        f"{found['model']}, {found['utterances']} utterances of {', '.join(found['audio'])}, {found['padding']}: distance of the "
        "states from the padded model's, in percent of their norm. Columns: the speech, the real silence, and the cached silence "
        "by its distance from the speech. Next-token distributions for the padded model's text: KL "
        f"{show(found['kl_nats'], 4)} nats, same most likely token for {show(found['same_token_percent'], 1)} %. Of its "
        f"attention, the padded model's decoder pays {show(found['attention_to_silence_percent'], 0)} % to silence, of which "
        f"{show(found['of_that_to_sinks_percent'], 0)} % go to the positions in no group.\n\n"
        f"{markdown_table(['input of layer', *places], rows)}"
    )


def lengths_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- lengths NAME -->`, from `silence_cache/lengths-NAME.json`."""
    found = read_json(results_folder / "silence_cache" / f"lengths-{name}.json", "recipes/silence_cache/lengths.py")
    labels = list(found["rows"][0]["seconds"])
    rows = [
        [show(row["audio_s"], 0), *(show(row["seconds"][label], 2) for label in labels),
         *(f"{show(row['seconds'][labels[0]] / row['seconds'][label], 1)}×" for label in labels[1:])]
        for row in found["rows"]
    ]  # fmt: skip
    head = ["audio s", *(f"{label}, s" for label in labels), *(f"{label}, speed-up" for label in labels[1:])]
    return (
        f"whisper-{name}, batch 1, {found['utterances']} recordings cut to each length, medians of {found['rounds']} interleaved "
        f"rounds, seconds from audio in memory to text; {found['provenance']['cpu']}, {found['provenance']['threads']} "
        f"threads.\n\n{markdown_table(head, rows)}"
    )
