"""Markdown pages: fills tables between markers, and writes the page of all results."""

from __future__ import annotations

import re
from pathlib import Path

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.comparisons import comparison_table
from efficient_asr.reporting.plots import plot_name
from efficient_asr.reporting.published import Published
from efficient_asr.reporting.results import group_runs
from efficient_asr.reporting.tables import make_table, published_table
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import find

MARKER = re.compile(
    r"(<!-- (?P<kind>[a-z0-9_]+) (?P<name>[\w./-]+(?: \(\w+\))?)(?P<words>[\w+ ]*) -->\n).*?(?P<end><!-- /(?P=kind) -->)",
    re.DOTALL,
)


def fill_markers(text: str, runs: list[Result], published: list[Published], results_folder: Path) -> str:
    """Fill every `<!-- KIND NAME -->` ... `<!-- /KIND -->` of a Markdown text.

    `<!-- table corpus/split -->` is a table of results. Techniques listed after the name select rows in addition to the baseline:
    `<!-- table corpus/split x x+y -->`. `<!-- published 2303.06740 x -->` is the table of a paper,
    of its baseline and the listed techniques. `<!-- compared NAME -->` shows NAME.json of `efficient-asr compare`.
    Techniques declare other kinds (`page_markers`); undeclared kinds are left unchanged.

    Arguments
    ---------
    text : str
        The page.
    runs, published : list
        Data for the tables.
    results_folder : Path
        Folder with the results of the techniques.

    Raises
    ------
    UserError
        If a requested table has no results.
    """
    groups = group_runs(runs)

    def fill(match: re.Match) -> str:
        if match["kind"] == "published":
            return match[1] + _published(match["name"], match["words"].split(), published) + "\n" + match["end"]
        if match["kind"] == "table":
            return match[1] + _table(match["name"], match["words"].split(), groups, published) + "\n" + match["end"]
        if match["kind"] == "compared":
            return match[1] + comparison_table(match["name"], results_folder) + "\n" + match["end"]
        content = find("page_markers", match["kind"])
        return match[0] if content is None else match[1] + content(match["name"], results_folder) + "\n" + match["end"]

    begun, complete = len(re.findall(r"^<!-- table ", text, re.MULTILINE)), [m["kind"] for m in MARKER.finditer(text)]
    if begun != complete.count("table"):
        raise UserError("a marker `<!-- table NAME -->` is malformed or has no `<!-- /table -->`")
    return MARKER.sub(fill, text)


def _table(name: str, words: list[str], groups: dict[str, list[Result]], published: list[Published]) -> str:
    if name not in groups:
        raise UserError(
            f"table '{name}' is requested, but has no results; results exist for: {', '.join(groups) or 'nothing'}"
        )
    wanted = {"none", *(word.replace("+", " + ") for word in words)}
    results = [r for r in groups[name] if len(wanted) == 1 or r.technique in wanted]
    if not results:
        raise UserError(f"table '{name}': no results of {', '.join(words)}, and no baseline")
    return make_table(name, results, published)


def _published(arxiv: str, words: list[str], published: list[Published]) -> str:
    """Return the table of a paper, with its setting and the places that the numbers were read from."""
    kinds = [word.replace("+", " + ") for word in words]
    rows = [
        row
        for row in published
        if arxiv in row.paper and (not kinds or row.technique in kinds or row.variant == "baseline")
    ]
    if not rows:
        raise UserError(f"published table '{arxiv}' is requested, but there is none in results/published")
    title = f"Published, not measured here: {rows[0].paper}; {rows[0].setting}."
    return f"{title}\n\n{published_table(rows)}"


def results_page(runs: list[Result], published: list[Published], plots: str = "plots") -> str:
    """Return the text of results/README.md with all tables and plots."""
    parts = [
        "# Results",
        "",
        "Written by `python scripts/report.py` from `runs/*.json` (measured here) and `published/*.json` (the papers' numbers).",
        "Every row names the commit, versions and hardware in its JSON file.",
    ]
    for name, results in group_runs(runs).items():
        parts += ["", f"## {name}", "", make_table(name, results, published), ""]
        parts.append(f"![WER against cost on {name}]({plots}/{plot_name(name)})")
    for paper in sorted({p.paper for p in published}):
        parts += ["", f"## Published: {paper}", "", next(p.setting for p in published if p.paper == paper), ""]
        parts.append(published_table([p for p in published if p.paper == paper]))
    return "\n".join(parts) + "\n"
