"""Collect an optimiser study: learning curves and WER of several runs, beside the model before training.

    python recipes/finetune_whisper/compare.py output/de/*/* --before output/de_before --out results/optimizers/de.json

A run is the output folder of a training with `results_folder` inside of it, as by default; --before is the output folder of the
same YAML file with --test_only True. Draws the curves, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.results import load_runs
from efficient_asr.techniques.finetuning.report import draw_optimizers, optimizers_table
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

NUMBER = r"([-+.\deEnaif]+)"
LINE = re.compile(rf"epoch: (\d+).*train loss: {NUMBER} - valid loss: {NUMBER}, valid wer_percent: {NUMBER}")
SETTINGS = (
    "source", "lr", "batch_size", "grad_accumulation_factor", "warmup_steps", "epoch_batches", "number_of_epochs", "weight_decay",
    "precision", "freeze_encoder", "lora_rank", "spec_augment",
)  # fmt: skip


def results_of(folder: Path) -> list[Result]:
    """Return the results of a run, one for each test split."""
    found = load_runs(folder / "results")
    if not found:
        raise UserError(f"{folder}/results: no results; has the run ended?")
    return found


def curve(folder: Path, epoch_steps: int) -> list[dict[str, float]]:
    """Return losses and WER after each epoch, from train_log.txt."""
    path = folder / "train_log.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [match.groups() for line in lines if (match := LINE.search(line))]
    if not found:
        raise UserError(f"{path}: no epochs; is {folder} the output folder of a training?")
    names = ("train_loss", "valid_loss", "wer_percent")
    return [{"step": int(e) * epoch_steps} | dict(zip(names, map(float, rest), strict=True)) for e, *rest in found]


def describe(folder: Path) -> dict[str, Any]:
    """Return optimiser, seed, curve and test WER of a run."""
    results = results_of(folder)
    settings = results[0].hparams
    if not settings.get("epoch_batches") or "optimizer" not in settings:
        raise UserError(
            f"{folder}: not a run of hparams/finetune_whisper.yaml (no optimizer, or epoch_batches is null)"
        )
    steps = math.ceil(settings["epoch_batches"] / settings["grad_accumulation_factor"])
    return {
        "optimizer": settings["optimizer"], "seed": settings["seed"], "curve": curve(folder, steps),
        "wer_percent": {result.split: result.wer_percent for result in results},
        "settings": {key: settings.get(key) for key in SETTINGS}, "provenance": results[0].provenance,
    }  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders")
    parser.add_argument("--before", type=Path, required=True, help="output folder of the untrained model's evaluation")
    parser.add_argument("--out", type=Path, required=True, help="file for the study")
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    before, runs = results_of(args.before), [describe(folder) for folder in args.runs]
    for run, folder in zip(runs, args.runs, strict=True):
        if run["settings"] != runs[0]["settings"]:
            raise UserError(
                f"{folder}: trained with other settings than {args.runs[0]}; compare runs with the same budget"
            )
    study = {
        "model": Path(str(before[0].hparams["source"])).name, "corpus": before[0].corpus, "synthetic": before[0].synthetic,
        "settings": runs[0]["settings"], "utterances": {result.split: result.utterances for result in before},
        "before": {"wer_percent": {result.split: result.wer_percent for result in before}},
        "runs": sorted(runs, key=lambda run: (run["optimizer"], run["seed"])),
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    print(f"study: {args.out}")
    if args.out.parent.name == "optimizers":
        print(optimizers_table(args.out.stem, args.out.parent.parent))
        print("\n".join(f"figure: {path}" for path in draw_optimizers(args.out.parent.parent)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
