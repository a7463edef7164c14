"""Generate tables and plots from results.

python scripts/report.py                      # README tables, results/README.md, results/plots
python scripts/report.py --check              # fail if the tables in the READMEs are out of date
python scripts/report.py --runs FOLDER        # print the tables of another folder and write its plots there
python scripts/report.py --compare A.json B.json   # paired bootstrap test between two results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.wer import count_errors, paired_bootstrap
from efficient_asr.reporting.pages import fill_markers, results_page
from efficient_asr.reporting.plots import plot, plot_name
from efficient_asr.reporting.published import load_published
from efficient_asr.reporting.results import check_comparable, group_runs, load_runs
from efficient_asr.reporting.tables import make_table
from efficient_asr.utils.errors import UserError, exit_code
from efficient_asr.utils.technique import techniques

ROOT = Path(__file__).parent.parent


def compare(path_a: str, path_b: str) -> None:
    """Print a significance test of the WER difference between two results on the same utterances."""
    results = [Result.load(Path(path)) for path in (path_a, path_b)]
    check_comparable("the two results", results)
    errors = []
    for result in results:
        rows = sorted(result.load_utterances(), key=lambda row: row["id"])
        errors.append(count_errors([row["reference"] for row in rows], [row["hypothesis"] for row in rows]))
    test = paired_bootstrap(*errors)
    print(
        f"{results[1].experiment} minus {results[0].experiment}: {test['difference_percent']:+.2f} % WER, "
        f"95 % [{test['low_percent']:+.2f}, {test['high_percent']:+.2f}], p = {test['p_value']:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"))
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    runs, published = load_runs(args.runs), load_published(ROOT / "results" / "published")
    if not runs:
        raise UserError(f"no results in {args.runs}")
    own = args.runs.resolve() == (ROOT / "results" / "runs").resolve()
    if own:
        pages = {ROOT / "results" / "README.md": results_page(runs, published)}
        for path in [ROOT / "README.md", *ROOT.glob("recipes/*/README.md")]:
            pages[path] = fill_markers(path.read_text(encoding="utf-8"), runs, published, ROOT / "results")
        for path, text in pages.items():
            if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
                raise UserError(f"{path} is out of date; run python scripts/report.py")
            if not args.check:
                path.write_text(text, encoding="utf-8")
    if args.check:
        return None
    plots = ROOT / "results" / "plots" if own else args.runs.parent / "plots"
    for name, results in group_runs(runs).items():
        if not own:
            print(make_table(name, results, published) + "\n")
        print(f"plot: {plot(name, results, plots / plot_name(name))}")
    for technique in techniques() if own else ():
        for picture in technique.load(technique.pictures)(ROOT / "results") if technique.pictures else ():
            print(f"plot: {picture}")
    return None


if __name__ == "__main__":
    sys.exit(exit_code(main))
