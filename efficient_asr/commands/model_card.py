"""Write the model card of a model folder: README.md in the form of the Hugging Face hub, with its results.

    efficient-asr model_card output/my_model/1986/model
    efficient-asr model_card MODEL --results a.json b.json

Without --results, those of the recipe's run are taken: `../results/*.json` beside the folder. Recipes write the card
themselves; use this for models that were measured later. A README.md of another author is left alone unless --overwrite is
given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from efficient_asr.evaluation.model_card import check_results, results_beside, write_card
from efficient_asr.utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model folder")
    parser.add_argument("--results", type=Path, nargs="+", help="results of efficient-asr evaluate or of a recipe")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md of another author")
    args = parser.parse_args(argv)
    results = check_results(args.model, args.results or results_beside(args.model))
    path = write_card(args.model, results, args.overwrite)
    if path is None:
        raise UserError(f"{args.model / 'README.md'} was not written by efficient_asr; pass --overwrite to replace it")
    print(f"{len(results)} results\nmodel card: {path}")
