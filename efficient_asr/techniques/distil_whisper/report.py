"""Table of students beside their teacher."""

from __future__ import annotations

from pathlib import Path

from efficient_asr.reporting.results import read_json
from efficient_asr.reporting.tables import markdown_table, show, show_difference


def students_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- distil_whisper NAME -->`, from `distil_whisper/NAME.json`."""
    path = results_folder / "distil_whisper" / f"{name}.json"
    result = read_json(path, "recipes/distil_whisper/compare.py")
    systems, timing = result["systems"], result.get("timing", {"systems": {}})
    first = next(iter(systems))
    corpora = [corpus for corpus in systems[first]["corpora"] if corpus != "all"]
    rows = []
    for system, entry in systems.items():
        every = entry["corpora"]["all"]
        difference = show_difference(every, system == first)
        cells = [system, show(entry["parameters"], 0, 1e-6), show(every["wer_percent"]), difference]
        cells += [show(entry["corpora"][corpus]["wer_percent"]) for corpus in corpora]
        cells += [show(every["insertions_percent"]), str(every["repeated_5grams"]), show(entry["macs_g"], 1)]
        times = timing["systems"].get(system, {})
        own = [times.get(str(batch), times.get(batch, {})) for batch in (1, 8)]
        for each in own:
            seconds = each.get("seconds")
            cells.append(show(timing["audio_s"] / seconds if seconds else None, 1))
        rows.append([*cells, show(own[0].get("tokens_per_s"), 0)])
    head = [
        "system", "M parameters", "WER %", "difference [95 %]", *(f"{corpus} WER %" for corpus in corpora), "insertions %",
        "repeated 5-grams", "GMACs", "rtfx, batch 1", "rtfx, batch 8", "tokens/s, batch 1",
    ]  # fmt: skip
    about = systems[first]["corpora"]["all"]
    title = (
        f"Real speech, {about['utterances']} utterances, {about['words']} words; Whisper's own normaliser; difference from the "
        "first row with a paired bootstrap interval."
    )
    if timing["systems"]:
        title += (
            f" MACs and times of {timing['utterances']} utterances ({timing['audio_s'] / 60:.1f} min), medians of "
            f"{timing['rounds']} interleaved rounds, {timing['cpu']}, {timing['threads']} threads."
        )
    return f"{title}\n\n{markdown_table(head, rows)}"
