"""Table and figure of an optimiser study: `optimizers/<name>.json`, written by recipes/finetune_whisper/compare.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from efficient_asr.reporting.figures import COLOURS, pyplot, save_figure
from efficient_asr.reporting.results import read_json
from efficient_asr.reporting.tables import markdown_table

WRITER = "recipes/finetune_whisper/compare.py"


def spread(values: Iterable[float]) -> str:
    """Return the mean with half of the distance between the greatest and the smallest value."""
    values = list(values)
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else mean


def by_optimizer(study: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each optimiser."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in study["runs"]:
        found.setdefault(run["optimizer"], []).append(run)
    return found


def optimizers_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- optimizers NAME -->`."""
    study = read_json(results_folder / "optimizers" / f"{name}.json", WRITER)
    before, splits = study["before"], list(study["before"]["wer_percent"])
    rows = [["before", "–", "–", "–", "–", *(f"{before['wer_percent'][split]:.2f}" for split in splits)]]
    for optimizer, runs in by_optimizer(study).items():
        last = [run["curve"][-1] for run in runs]
        cells = [
            optimizer,
            str(len(runs)),
            *(spread(each[key] for each in last) for key in ("train_loss", "valid_loss")),
        ]
        cells.append(spread(min(each["wer_percent"] for each in run["curve"]) for run in runs))
        rows.append([*cells, *(spread(run["wer_percent"][split] for run in runs) for split in splits)])
    head = ["optimiser", "seeds", "train loss", "validation loss", "best validation WER %"]
    settings, sizes, steps = study["settings"], study["utterances"], study["runs"][0]["curve"][-1]["step"]
    tests = ", ".join(f"{split} {sizes[split]} utterances" for split in splits)
    title = (
        f"{study['model']}, {'synthetic' if study['synthetic'] else 'real'} speech, {steps} steps "
        f"of {settings['batch_size']} utterances, learning rate {settings['lr']:g}, warm-up {settings['warmup_steps']}; "
        f"{tests}. ± is half the distance between the seeds."
    )
    return f"{title}\n\n{markdown_table([*head, *(f'{split} WER %' for split in splits)], rows)}"


def draw_optimizers(results_folder: Path) -> list[Path]:
    """Draw loss and WER over steps for every study; return the pictures."""
    drawn = []
    for path in sorted((results_folder / "optimizers").glob("*.json")):
        study = read_json(path, WRITER)
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
        kinds = (
            ("train_loss", "training loss"),
            ("valid_loss", "validation loss"),
            ("wer_percent", "validation WER, %"),
        )
        for axis, (key, label) in zip(axes, kinds, strict=True):
            for colour, (optimizer, runs) in zip(COLOURS[1:], by_optimizer(study).items(), strict=False):
                for number, run in enumerate(runs):
                    steps = [each["step"] for each in run["curve"]]
                    values = [each[key] for each in run["curve"]]
                    axis.plot(
                        steps, values, "o-", ms=3, color=colour, alpha=1 if number == 0 else 0.5,
                        label=optimizer if number == 0 else None,
                    )  # fmt: skip
            axis.set(xlabel="optimiser steps", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0].legend(frameon=False)
        figure.suptitle(f"{study['model']} on {study['corpus']}", fontsize=10)
        drawn.append(save_figure(figure, results_folder / "plots" / f"optimizers-{path.stem}.png"))
    return drawn
