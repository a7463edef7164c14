"""Publish a model folder with its card: on the Hugging Face Hub, or in another folder.

    efficient-asr publish output/my_model/1986/model my_organisation/my-model --private
    efficient-asr publish output/my_model/1986/model /shared/models/my-model

Every command then takes the hub id, or the folder, as its MODEL. The hub needs `hf auth login`, or HF_TOKEN. A folder without a
README.md gets a model card first (`efficient-asr model_card`). Nothing is published that is not in the model folder. A TARGET of
the form organisation/name is on the hub unless a folder of that name exists here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from efficient_asr.evaluation.model_card import check_results, results_beside, write_card
from efficient_asr.models.hub import publish


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model folder")
    parser.add_argument("target", metavar="TARGET", help="hub id, organisation/name; or a folder, such as ./name")
    parser.add_argument(
        "--private", action="store_true", help="the repository on the hub must be private; a new one is made so"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace all files that are there already")
    args = parser.parse_args(argv)
    if not (args.model / "README.md").is_file():
        write_card(args.model, check_results(args.model, results_beside(args.model)))
        print(f"model card: {args.model / 'README.md'}")
    print(f"model: {publish(args.model, args.target, args.private, args.overwrite)}")
