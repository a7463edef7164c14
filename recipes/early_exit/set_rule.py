"""Write a copy of an early-exit model with another rule, threshold, patience or choice of heads, to be used like any other model.

    python recipes/early_exit/set_rule.py MODEL --rule entropy --threshold 0.15 --out MODEL_fast
    python recipes/early_exit/set_rule.py MODEL --rule none --out MODEL_full_depth
    python recipes/early_exit/set_rule.py MODEL --rule entropy --threshold 0.15 --layers 2 6 --out MODEL_two_heads

`recipes/early_exit/sweep.py` shows what each threshold costs; the rules are in `efficient_asr/techniques/early_exit/heads.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import read_config
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.early_exit.heads import RULES, ExitHeads
from efficient_asr.utils.errors import UserError, check_writable, exit_code


def _about_with_rule(about: dict[str, Any], model: CTCModel) -> dict[str, Any]:
    """Return what is known of how the model was made, with its new rule; results of the former rule are left out."""
    heads, details = model.head, about.get("details")
    new = {"exit_rule": heads.rule, "exit_threshold": heads.threshold, "exit_patience": heads.patience}
    kept = details if isinstance(details, dict) else {}
    measured = ("mean_exit_layer", "exit_layers", "wer_percent_of_heads")
    kept = {key: value for key, value in kept.items() if key not in measured}
    return about | {"variant": model.label, "details": kept | new}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rule", choices=RULES, required=True)
    parser.add_argument("--threshold", type=float, help="threshold of the rule; never exits early if not given")
    parser.add_argument("--patience", type=at_least(1), default=1, help="consecutive heads that must agree (default 1)")
    parser.add_argument(
        "--layers",
        type=at_least(1),
        nargs="+",
        help="layers whose heads stay (default: all); the last layer's always stays",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; choose another folder")
    check_writable(args.out.absolute().parent, "--out")
    source = model_source(args.model)
    model = CTCModel.load(source)
    if not isinstance(model.head, ExitHeads):
        raise UserError(f"{args.model} is no early-exit model; train one with recipes/early_exit/train.py")
    model.head.keep(args.layers or model.head.layers)
    model.head.set_rule(args.rule, args.threshold, args.patience)
    model.head.check_patience()
    about = read_config(source).get("about")
    model.save(args.out, _about_with_rule(about, model) if isinstance(about, dict) else None)
    print(f"model that exits by {model.head.label}: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
