"""Compare routers between a small and a large model: WER against MACs and time, and the fraction of the oracle's gain.

    python recipes/decider/compare.py --pair tiny base --models WHISPER_TINY WHISPER_BASE --dev dev --tests clean noisy \\
        --deciders output/decider/1986/model output/decider/1987/model --out results/routing/tiny-base.json

All numbers are computed from the records of `recipes/decider/label.py` (<labels>/<name>-<split>.jsonl,
<states>/<name>-<split>) and the manifests (<manifests>/<split>.jsonl). Both models have transcribed every utterance, so the
outcome of any choice is known exactly; its cost includes the models, their encoders and the router. Deciders are model folders
of the recipe; several deciders of one kind (seeds) are averaged. Rules need no training. Writes a JSON file and a plot next
to it.
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
from efficient_asr.utils.files import atomic_write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", nargs=2, required=True, metavar=("SMALL", "LARGE"), help="names of the models in the records"
    )
    parser.add_argument("--models", nargs=2, required=True, metavar=("SMALL", "LARGE"), help="the Whisper models")
    parser.add_argument("--labels", type=Path, default=Path("output/routing/labels"))
    parser.add_argument("--states", type=Path, help="folder of saved encoder states; recomputed if not given")
    parser.add_argument("--manifests", type=Path, default=Path("data/routing/manifests"))
    parser.add_argument("--dev", default="dev", help="split on which thresholds are chosen")
    parser.add_argument("--tests", nargs="+", required=True, help="splits to compare on")
    parser.add_argument("--deciders", nargs="*", default=[], help="model folders of the recipe decider")
    parser.add_argument("--rules", nargs="*", default=list(RULES), help=f"any of {', '.join(RULES)}")
    parser.add_argument("--bootstrap", type=int, default=1000, help="number of bootstrap samples")
    parser.add_argument("--corpus", default="routing-dev", help="corpus name for all test sets together")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    kinds: dict[str, list[Router]] = {}
    for folder in args.deciders:
        routers, _, names = load_routers(Path(folder))
        if len(routers) != 1:
            raise UserError(f"--deciders: {folder} is not a cascade of two models saved by recipes/decider")
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
        "device": comparison.device,
        "provenance": provenance(None),
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(result, indent=1, default=float) + "\n")
    print(f"result: {args.out}\nplot: {draw(result, args.out.with_suffix('.png'))}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
