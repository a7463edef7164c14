"""results/runs/*.json and results/published/*.json -> tables and plots.

Reads results only. Results measured on different utterances (another `benchmark_hash`) never share a table, synthetic
speech is labelled so, and what was not measured is a dash.
"""

from __future__ import annotations

import json
import re
import string
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_asr.errors import UserError
from efficient_asr.evaluation.result import Result

MARKER = re.compile(
    r"(<!-- table (?P<name>[\w./-]+)(?P<techniques>[\w+ ]*) -->\n).*?(?P<end><!-- /table -->)", re.DOTALL
)
MOST_LABELS = 6  # points of a plot; of more the Pareto front alone gets letters


@dataclass
class Published:
    """One row of a published table, with its source.

    Attributes
    ----------
    technique, variant : str
        As in our results, so that both can stand side by side.
    values : dict
        `wer_percent`, `wer_lm_percent`, `macs_g`, `cpu_s`, `gpu_s`; absent where the source gives none.
    paper, source : str
        Citation, and where the number was read.
    setting : str
        Model, training and test data of the source.
    name : str
        The source's own name of the row.
    """

    technique: str
    variant: str
    values: dict[str, float]
    paper: str
    source: str
    setting: str
    name: str


def load_runs(folder: Path) -> list[Result]:
    """Read all results of a folder, in order of their names."""
    return [Result.load(path) for path in sorted(Path(folder).glob("*.json"))]


def load_published(folder: Path) -> list[Published]:
    """Read all published tables of a folder.

    Raises
    ------
    UserError
        Where a table names no source.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for key in ("paper", "source", "setting", "rows"):
            if not table.get(key):
                raise UserError(f"{path}: '{key}' is missing; published numbers need their source")
        for row in table["rows"]:
            values = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            source = row.get("source", table["source"])
            rows.append(
                Published(
                    row["technique"], row["variant"], values, table["paper"], source, table["setting"], row["name"]
                )
            )
    return rows


def group_runs(results: list[Result]) -> dict[str, list[Result]]:
    """Group results by `corpus/split`.

    Raises
    ------
    UserError
        Where two results claim the same split but were measured on different utterances.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[f"{result.corpus}/{result.split}"].append(result)
    for name, members in groups.items():
        check_comparable(name, members)
        members.sort(key=lambda r: (r.technique != "none", r.technique, r.variant))
    return dict(groups)


def check_comparable(name: str, results: list[Result]) -> None:
    """Refuse results of different benchmarks in one table.

    Raises
    ------
    UserError
        Naming the files and their hashes.
    """
    hashes: dict[str, list[str]] = defaultdict(list)
    for result in results:
        hashes[result.benchmark_hash].append(result.path.name if result.path else result.experiment)
    if len(hashes) > 1:
        shown = "; ".join(f"{key}: {', '.join(files)}" for key, files in hashes.items())
        raise UserError(
            f"results of {name} were measured on different utterances or with different normalisers and cannot share a table "
            f"({shown}); measure them again on the same data, or move one set away"
        )


# ---------------------------------------------------------------- tables


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Draw a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _show(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _seconds(result: Result, device: str, batch_size: int | None, lm: bool = False) -> str:
    entry = result.runtime(device, batch_size, lm)
    return "–" if entry is None else f"{entry['runtime_s']:.2f}"


def _speed_up(result: Result, baseline: Result | None, batch_size: int = 1) -> str:
    own, reference = result.runtime("cpu", batch_size), baseline and baseline.runtime("cpu", batch_size)
    same = own and reference and all(own[key] == reference[key] for key in ("device_name", "threads"))
    return "–" if not same else f"{reference['runtime_s'] / own['runtime_s']:.2f}×"


def baseline_of(results: list[Result]) -> Result | None:
    """The result without a technique; of several, such as single models beside a cascade of them, the costliest."""
    return max((r for r in results if r.technique == "none"), key=lambda r: r.macs_g or 0.0, default=None)


def make_table(name: str, results: list[Result], published: list[Published]) -> str:
    """Draw one Markdown table of a benchmark, the published figures of the same rows beside ours.

    Arguments
    ---------
    name : str
        `corpus/split`.
    results : list of Result
        All of one benchmark.
    published : list of Published
        Rows to look for by technique and variant.

    Raises
    ------
    UserError
        Where the results are of different benchmarks.
    """
    check_comparable(name, results)
    first, baseline = results[0], baseline_of(results)
    by_row = {(p.technique, p.variant): p for p in published}
    matches = [by_row.get((r.technique, r.variant)) for r in results]
    batch = max((r["batch_size"] for result in results for r in result.runtimes), default=8)
    kind = "**synthetic speech**" if first.synthetic else "real speech"
    head = [
        "variant",
        "WER % [95 %]",
        "WER % LM",
        "GMACs",
        "GMACs (thop)",
        "CPU s",
        "speed-up",
        f"CPU s, batch {batch}",
        "speed-up",
        "CPU s, LM",
        "GPU s",
        "GPU s, LM",
    ]
    exits = any("mean_exit_layer" in result.details for result in results)
    if exits:
        head.insert(1, "mean exit layer")
    if any(matches):
        head += ["paper: WER %", "WER % LM", "GMACs", "CPU s"]
    title = (
        f"`{name}`: {kind}, {first.utterances} utterances, {first.audio_s / 60:.1f} min, {first.reference_words} words."
    )
    rows = []
    for result, match in zip(results, matches, strict=True):
        ci = result.wer_ci95_percent
        cells = [
            f"{result.technique} {result.variant}" if result.technique != "none" else result.variant,
            _show(result.wer_percent, 2) + (f" [{ci[0]:.1f}, {ci[1]:.1f}]" if ci else ""),
            _show(result.wer_lm_percent, 2),
            _show(result.macs_g, 3),
            _show(result.macs_thop_g, 3),
            _seconds(result, "cpu", 1),
            _speed_up(result, baseline),
            _seconds(result, "cpu", batch),
            _speed_up(result, baseline, batch),
            _seconds(result, "cpu", 1, lm=True),
            _seconds(result, "cuda", 1),
            _seconds(result, "cuda", 1, lm=True),
        ]
        if exits:
            cells.insert(1, _show(result.details.get("mean_exit_layer"), 2))
        if any(matches):
            values = match.values if match else {}
            cells += [
                _show(values.get(k), d)
                for k, d in (("wer_percent", 2), ("wer_lm_percent", 2), ("macs_g", 1), ("cpu_s", 0))
            ]
        rows.append(cells)
    hardware = sorted({f"{r['device_name']}, {r['threads']} threads" for result in results for r in result.runtimes})
    notes = "GMACs are the mean of an utterance; seconds are for the whole split"
    lines = [title, "", markdown_table(head, rows), "", notes + (f" ({'; '.join(hardware)})." if hardware else ".")]
    found = [m for m in matches if m]
    if found:
        sources = "; ".join(sorted({m.source for m in found}))
        lines.append(f"Paper: {found[0].paper}, {found[0].setting}; read from {sources}.")
    return "\n".join(lines)


def published_table(published: list[Published], paper: str) -> str:
    """Draw everything that is known of one paper's tables."""
    columns = ("wer_percent", "wer_lm_percent", "macs_g", "cpu_s", "cpu_lm_s", "gpu_s", "gpu_lm_s")
    head = ["row", "WER %", "WER % LM", "GMACs", "CPU s", "CPU s, LM", "GPU s", "GPU s, LM", "read from"]
    rows = [row for row in published if row.paper == paper]
    return markdown_table(
        head, [[row.name, *(_show(row.values.get(key), 2) for key in columns), row.source] for row in rows]
    )


def render(text: str, runs: list[Result], published: list[Published]) -> str:
    """Fill every `<!-- table NAME -->` ... `<!-- /table -->` of a Markdown text; NAME is `corpus/split`.

    Techniques that follow the name select rows, besides the baseline: `<!-- table NAME early_exit downsampling+early_exit -->`.

    Raises
    ------
    UserError
        Where a table is asked for that no result belongs to.
    """
    groups = group_runs(runs)

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name not in groups:
            raise UserError(
                f"a table '{name}' is asked for, but there are results of {', '.join(groups) or 'nothing'} only"
            )
        wanted = {"none", *(word.replace("+", " + ") for word in match["techniques"].split())}
        results = [r for r in groups[name] if len(wanted) == 1 or r.technique in wanted]
        return match[1] + make_table(name, results, published) + "\n" + match["end"]

    return MARKER.sub(fill, text)


def results_page(runs: list[Result], published: list[Published], plots: str = "plots") -> str:
    """Return results/README.md: every table and plot."""
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
        parts.append(published_table(published, paper))
    return "\n".join(parts) + "\n"


# ---------------------------------------------------------------- plots


def plot_name(name: str) -> str:
    """File name of a benchmark's plot."""
    return name.replace("/", "_") + ".png"


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, error) that no other point beats in both, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _family(result: Result) -> str:
    """What shares a colour: a technique; of early exit, a rule."""
    if result.technique == "none":
        return "baseline"
    rule = result.details.get("exit_rule")
    suffix = {None: "", "none": ", full depth"}.get(rule, f", {rule}")
    return result.technique.replace("_", " ") + suffix


def plot(name: str, results: list[Result], path: Path) -> Path:
    """Draw WER against MACs and against CPU time, the Pareto front marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    check_comparable(name, results)
    many = len(results) > MOST_LABELS
    size = (13, 5.2) if many else (11, 4.2)
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    costs: list[tuple[str, Any]] = [
        ("GMACs per utterance", lambda r: r.macs_g),
        ("CPU seconds for the split, batch 1", lambda r: (r.runtime("cpu") or {}).get("runtime_s")),
    ]
    families = sorted({_family(r) for r in results}, key=lambda f: (f != "baseline", f))
    styles = {family: (f"C{i % 10}", "osD^vP"[i % 6]) for i, family in enumerate(families)}
    for ax, (label, cost) in zip(axes, costs, strict=True):
        shown = [(cost(r), r.wer_percent, r) for r in results if cost(r) is not None and r.wer_percent is not None]
        shown.sort(key=lambda point: point[0])
        for i, (x, y, r) in enumerate(shown):
            low, high = r.wer_ci95_percent or (y, y)
            colour, marker = styles[_family(r)]
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
