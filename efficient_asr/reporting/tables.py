"""Markdown tables of results. Missing measurements are shown as a dash; synthetic speech is labelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.published import Published
from efficient_asr.reporting.results import baseline_of, check_comparable, machine_of
from efficient_asr.utils.technique import techniques


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def show(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    """Format a number for a table; a dash for None."""
    return "–" if value is None else f"{factor * value:.{digits}f}"


def show_difference(entry: dict[str, Any], is_first: bool) -> str:
    """Format the difference and interval of `efficient_asr.evaluation.wer.compared`; a dash for what others are compared with."""
    low, high = entry["ci95_percent"]
    return "–" if is_first else f"{entry['difference_percent']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _seconds(result: Result, device: str, batch_size: int | None, lm: bool = False) -> str:
    entry = result.runtime(device, batch_size, lm)
    return "–" if entry is None else f"{entry['runtime_s']:.2f}"


def _speed_up(result: Result, baseline: Result | None, batch_size: int = 1) -> str:
    own, reference = result.runtime("cpu", batch_size), baseline and baseline.runtime("cpu", batch_size)
    same = own and reference and machine_of(own) == machine_of(reference)
    return "–" if not same else f"{reference['runtime_s'] / own['runtime_s']:.2f}×"


def make_table(name: str, results: list[Result], published: list[Published]) -> str:
    """Format the Markdown table of a benchmark, with published figures in additional columns.

    Columns of techniques are added if at least one row has a value for them.

    Arguments
    ---------
    name : str
        `corpus/split`.
    results : list of Result
        Results of one benchmark.
    published : list of Published
        Published rows; only those of the same corpus, split and model are shown, beside ours.

    Raises
    ------
    UserError
        If the results are of different benchmarks.
    """
    check_comparable(name, results)
    first = results[0]
    matches = [next((p for p in published if p.matches(r)), None) for r in results]
    found = [match for match in matches if match]
    kind = "**synthetic speech**" if first.synthetic else "real speech"
    title = (
        f"`{name}`: {kind}, {first.utterances} utterances, {first.audio_s / 60:.1f} min, {first.reference_words} words, "
        f"normaliser `{first.normaliser}`."
    )
    columns = _columns(results)
    if found:
        columns += _published_columns(matches)
    rows = zip(*(cells for _, cells in columns), strict=True)
    hardware = sorted({machine_of(entry) for result in results for entry in result.runtimes})
    notes = "GMACs are the mean of an utterance; seconds are for the whole split"
    notes += f" ({'; '.join(hardware)})." if hardware else "."
    lines = [title, "", markdown_table([head for head, _ in columns], rows), "", notes]
    if found:
        sources = "; ".join(sorted({match.source for match in found}))
        lines.append(f"Paper: {found[0].paper}, {found[0].setting}; read from {sources}.")
    return "\n".join(lines)


def _columns(results: list[Result]) -> list[tuple[str, list[str]]]:
    """Return the heading and cells of each column of our results."""
    baseline = baseline_of(results)
    batch = max((r["batch_size"] for result in results for r in result.runtimes), default=8)
    added = [
        (column.head, [show(result.details.get(column.entry), column.digits) for result in results])
        for technique in techniques()
        for column in technique.columns
        if any(column.entry in result.details for result in results)
    ]
    return [
        ("variant", [row_name(r) for r in results]),
        *added,
        ("WER % [95 %]", [_wer(r) for r in results]),
        ("WER % LM", [show(r.wer_lm_percent) for r in results]),
        ("GMACs", [show(r.macs_g, 3) for r in results]),
        ("GMACs (thop)", [show(r.macs_thop_g, 3) for r in results]),
        ("CPU s", [_seconds(r, "cpu", 1) for r in results]),
        ("speed-up", [_speed_up(r, baseline) for r in results]),
        (f"CPU s, batch {batch}", [_seconds(r, "cpu", batch) for r in results]),
        ("speed-up", [_speed_up(r, baseline, batch) for r in results]),
        ("CPU s, LM", [_seconds(r, "cpu", 1, lm=True) for r in results]),
        ("GPU s", [_seconds(r, "cuda", 1) for r in results]),
        ("GPU s, LM", [_seconds(r, "cuda", 1, lm=True) for r in results]),
    ]


def _published_columns(matches: list[Published | None]) -> list[tuple[str, list[str]]]:
    """Return the heading and cells of each column of published figures."""
    heads = {
        "paper: WER %": ("wer_percent", 2),
        "WER % LM": ("wer_lm_percent", 2),
        "GMACs": ("macs_g", 1),
        "CPU s": ("cpu_s", 0),
    }
    return [
        (head, [show(match.values.get(key) if match else None, digits) for match in matches])
        for head, (key, digits) in heads.items()
    ]


def row_name(result: Result, short: bool = False) -> str:
    """Return the name of a row: technique and variant (only the variant if `short`); a baseline is named by its model."""
    if result.technique != "none":
        named = short or result.variant.startswith(result.technique)
        return result.variant if named else f"{result.technique} {result.variant}"
    if result.model_name and result.variant in ("baseline", result.hparams.get("model")):
        return f"baseline {result.model_name}"
    return result.variant


def _wer(result: Result) -> str:
    interval = result.wer_ci95_percent
    return show(result.wer_percent) + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def published_table(rows: list[Published]) -> str:
    """Format a table of published results."""
    columns = ("wer_percent", "wer_lm_percent", "macs_g", "cpu_s", "cpu_lm_s", "gpu_s", "gpu_lm_s")
    head = ["row", "WER %", "WER % LM", "GMACs", "CPU s", "CPU s, LM", "GPU s", "GPU s, LM", "read from"]
    return markdown_table(
        head, [[row.name, *(show(row.values.get(key), 2) for key in columns), row.source] for row in rows]
    )
