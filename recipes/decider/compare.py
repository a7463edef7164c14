"""Compare routers between a small and a large model on test sets: WER against MACs and time, and the share of the oracle's gain.

    python recipes/decider/compare.py --pair tiny base --models WHISPER_TINY WHISPER_BASE --dev dev --tests clean noisy \\
        --deciders output/decider/1986/model output/decider/1987/model --out results/routing/tiny-base.json

Everything follows from the records of `recipes/decider/label.py` (<labels>/<name>-<split>.jsonl, <states>/<name>-<split>)
and the manifests (<manifests>/<split>.jsonl): both models have transcribed every utterance, so the outcome of any choice is
known exactly, and its cost is what both models, their encoders and the router cost. Deciders are model folders of the
recipe; several of one kind (seeds) are averaged. Rules need no training. Writes a JSON file and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from efficient_asr.evaluation.result import provenance
from efficient_asr.techniques.decider.cascade import load_routers
from efficient_asr.techniques.decider.comparison import Comparison
from efficient_asr.techniques.decider.network import RULES, Rule
from efficient_asr.techniques.decider.report import draw
from efficient_asr.techniques.decider.router import Router
from efficient_asr.utils.errors import UserError, check_writable, exit_code


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", nargs=2, required=True, metavar=("SMALL", "LARGE"), help="names in the files of records"
    )
    parser.add_argument("--models", nargs=2, required=True, metavar=("SMALL", "LARGE"), help="the Whispers")
    parser.add_argument("--labels", type=Path, default=Path("output/routing/labels"))
    parser.add_argument("--states", type=Path, help="encoder states that were kept; computed again where not given")
    parser.add_argument("--manifests", type=Path, default=Path("data/routing/manifests"))
    parser.add_argument("--dev", default="dev", help="split that chooses thresholds")
    parser.add_argument("--tests", nargs="+", required=True, help="splits to compare on")
    parser.add_argument("--deciders", nargs="*", default=[], help="model folders of the recipe decider")
    parser.add_argument("--rules", nargs="*", default=list(RULES), help=f"of {', '.join(RULES)}")
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples")
    parser.add_argument("--corpus", default="routing-dev", help="name of the test sets together")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    kinds: dict[str, list[Router]] = {}
    for folder in args.deciders:
        routers, _, names = load_routers(Path(folder))
        if len(routers) != 1:
            raise UserError(f"--deciders: {folder} is not a cascade of two models that the recipe decider left behind")
        if names != args.pair:
            raise UserError(
                f"--deciders: {folder} chooses between {' and '.join(names)}, not {' and '.join(args.pair)}"
            )
        kinds.setdefault(routers[0].label, []).append(routers[0])
    for rule in args.rules:
        kinds[f"rule: {rule}"] = [Rule(rule)]
    comparison = Comparison(args)
    routers = {name: comparison.compare(name, kinds[name]) for name in tqdm(kinds, desc="comparing", leave=False)}
    synthetic = all(row.get("synthetic", False) for rows in comparison.rows.values() for row in rows)
    result = {
        "pair": args.pair, "corpus": args.corpus, "synthetic": synthetic, "encoders": comparison.encoders,
        "models": comparison.single_models(), "routers": routers, "threads": torch.get_num_threads(),
        "provenance": provenance(None),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1, default=float) + "\n", encoding="utf-8")
    print(f"result: {args.out}\nplot: {draw(result, args.out.with_suffix('.png'))}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
