"""Tables of selections of int8 layers, and of products with int8 weights."""

from __future__ import annotations

from pathlib import Path

from efficient_asr.reporting.results import read_json
from efficient_asr.reporting.tables import markdown_table, show, show_difference


def selection_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- int8_selection NAME -->`, from `int8/NAME.json` of scripts/search_int8.py."""
    found = read_json(results_folder / "int8" / f"{name}.json", "scripts/search_int8.py")
    rows = [
        [entry["mode"], show(entry["wer_percent"]), show_difference(entry, entry is found["check"][0])]
        for entry in found["check"]
    ]
    chosen = [block["block"] for block in found["blocks"] if block["chosen"]]
    worst = ", ".join(f"`{block['block']}` ({show(block['kl_nats'], 4)})" for block in found["blocks"][::-1][:3])
    first, audio = found["check"][0], found["check"][0]["audio"]
    return (
        f"{found['model']}: {len(chosen)} of {len(found['blocks'])} blocks chosen within {show(found['budget_nats'], 4)} nats a "
        f"token, on {found['recordings']} recordings without texts: {show(found['kl_nats'], 4)} nats; all blocks: "
        f"{show(found['kl_nats_of_all'], 4)}. Most sensitive: {worst}. Checked on {first['utterances']} utterances of {audio}, "
        f"real speech; difference from float32 with a paired bootstrap interval.\n\n"
        f"{markdown_table(['int8', 'WER %', 'difference [95 %]'], rows)}"
    )


def kernels_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- int8_kernels NAME -->`, from `int8/NAME.json`."""
    found = read_json(results_folder / "int8" / f"{name}.json", "scripts/benchmark_int8_kernels.py")
    shapes = list(dict.fromkeys((row["rows"], row["inputs"], row["outputs"]) for row in found["rows"]))
    by_place = {(row["system"], (row["rows"], row["inputs"], row["outputs"])): row for row in found["rows"]}
    rows = []
    for system in dict.fromkeys(row["system"] for row in found["rows"]):
        own = [by_place.get((system, shape)) for shape in shapes]
        errors = [entry["error"] for entry in own if entry is not None]
        rows.append([system, *(show(entry and entry["ms"], 2) for entry in own), show(100 * max(errors), 2)])
    head = ["ms for rows × inputs × outputs", *(" × ".join(map(str, shape)) for shape in shapes), "error %"]
    about = found["provenance"]
    return f"{about['cpu']}, {about['threads']} threads, medians.\n\n{markdown_table(head, rows)}"
