"""Generate tables and plots from results.

efficient-asr report --runs FOLDER                 # print the tables of a folder of results; plots go beside it
efficient-asr report --compare A.json B.json       # WER and cost of two results, and whether the difference is significant
python scripts/report.py                           # in a checkout: README tables, results/README.md, results/plots
efficient-asr report --html results.html           # the results as one page to explore in a browser, without a server
python scripts/report.py --check                   # fail if the tables in the READMEs are out of date
"""

from __future__ import annotations

import argparse
from pathlib import Path

import efficient_asr
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.wer import count_errors, paired_bootstrap
from efficient_asr.reporting.comparisons import draw_comparison
from efficient_asr.reporting.explorer import explorer_html
from efficient_asr.reporting.pages import fill_markers, results_page
from efficient_asr.reporting.plots import plot, plot_name
from efficient_asr.reporting.published import load_published
from efficient_asr.reporting.results import check_comparable, group_runs, load_runs, machine_of, read_json
from efficient_asr.reporting.tables import make_table, markdown_table, row_name, show
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.files import atomic_write_text
from efficient_asr.utils.technique import techniques

ROOT = Path(efficient_asr.__file__).parent.parent  # of a checkout; an installed package has no results
SAMPLES = 10000


def compare(path_a: str, path_b: str) -> str:
    """Compare two results on the same utterances.

    Returns
    -------
    str
        A table with WER and costs of both, and the difference of their WERs with its 95 % interval and p-value.

    Raises
    ------
    UserError
        If the results were not measured on the same utterances with the same normaliser.
    """
    results = [Result.load(Path(path)) for path in (path_a, path_b)]
    check_comparable("the two results", results)
    if not results[0].reference_words:
        raise UserError(f"{path_a} and {path_b} have no words to compare")
    errors = []
    for result in results:
        rows = sorted(result.load_utterances(), key=lambda row: row["id"])
        errors.append(count_errors([row["reference"] for row in rows], [row["hypothesis"] for row in rows]))
    test = paired_bootstrap(*errors, samples=SAMPLES)
    seconds = [(device, lm) for device in ("cpu", "cuda") for lm in (False, True)]
    seconds = [key for key in seconds if any(result.runtime(key[0], lm=key[1]) for result in results)]
    names = {"cpu": "CPU", "cuda": "GPU"}
    head = [
        "",
        "result",
        "row",
        "WER %",
        "GMACs",
        *(f"{names[device]} s{', LM' if lm else ''}" for device, lm in seconds),
    ]
    rows = [
        [
            letter, result.experiment, row_name(result), show(result.wer_percent), show(result.macs_g, 3),
            *(show((result.runtime(device, lm=lm) or {}).get("runtime_s")) for device, lm in seconds),
        ]
        for letter, result in zip("AB", results, strict=True)
    ]  # fmt: skip
    notes = {}
    for device, lm in seconds:
        machines = [machine_of(entry) for result in results if (entry := result.runtime(device, lm=lm))]
        if len({*machines}) > 1:
            which = f"A {machines[0]}; B {machines[1]}"
            notes[device] = f"\n\n{names[device]} s are of different machines ({which}): do not compare them."
    p_value = f"p < {2 / SAMPLES:g}" if test["p_value"] < 2 / SAMPLES else f"p = {test['p_value']:.4f}"
    return (
        f"{markdown_table(head, rows)}\n\nB minus A: {test['difference_percent']:+.2f} points of WER, 95 % interval "
        f"[{test['low_percent']:+.2f}, {test['high_percent']:+.2f}], {p_value} (paired bootstrap, {len(errors[0])} "
        f"utterances, normaliser {results[0].normaliser})"
    ) + "".join(notes.values())


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "results" / "runs", help="folder of results")
    parser.add_argument("--check", action="store_true", help="fail if the tables in the READMEs are out of date")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results on the same utterances")
    parser.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=Path("results.html"),
        help="file for a page to explore (default results.html)",
    )
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in ("html", "compare", "check") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} cannot be combined; run the command once for each")
    if args.html:
        check_writable(args.html.absolute().parent, "--html")
        atomic_write_text(args.html, explorer_html(args.runs))
        print(f"page: {args.html}")
        return
    if args.compare:
        print(compare(*args.compare))
        return
    runs, published = load_runs(args.runs), load_published(ROOT / "results" / "published")
    if not runs:
        raise UserError(f"no results in {args.runs}; name their folder with --runs")
    if args.check and args.runs.resolve() != (ROOT / "results" / "runs").resolve():
        raise UserError("--check compares the READMEs with the committed results; leave out --runs")
    own = args.runs.resolve() == (ROOT / "results" / "runs").resolve()
    if own:
        pages = {ROOT / "results" / "README.md": results_page(runs, published)}
        for path in [ROOT / "README.md", *ROOT.glob("recipes/*/README.md")]:
            pages[path] = fill_markers(path.read_text(encoding="utf-8"), runs, published, ROOT / "results")
        for path, text in pages.items():
            if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
                raise UserError(f"{path} is out of date; run python scripts/report.py")
            if not args.check:
                atomic_write_text(path, text)
    if args.check:
        return
    plots = ROOT / "results" / "plots" if own else args.runs.parent / "plots"
    for name, results in group_runs(runs).items():
        if not own:
            print(make_table(name, results, published) + "\n")
        print(f"plot: {plot(name, results, plots / plot_name(name))}")
    for path in sorted((ROOT / "results" / "compared").glob("*.json")) if own else ():
        if picture := draw_comparison(read_json(path, "efficient-asr compare"), path.with_suffix(".png")):
            print(f"plot: {picture}")
    for technique in techniques() if own else ():
        for picture in technique.load(technique.pictures)(ROOT / "results") if technique.pictures else ():
            print(f"plot: {picture}")
