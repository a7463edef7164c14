"""Compare exit thresholds of a trained early-exit model, without retraining.

    python recipes/early_exit/sweep.py MODEL --manifest test.jsonl --rule entropy --thresholds 0.01 0.03 0.06
    python recipes/early_exit/sweep.py MODEL --manifest dev.jsonl --rule similarity --calibrate_mean_layer 18

MODEL is the model folder written by recipes/early_exit (<output_folder>/model). Every utterance is computed once, which gives
WER, exit layers and MACs for all thresholds; then each threshold is timed. Writes one Result per threshold, a table and a plot
to --out. With --calibrate_*, the threshold is chosen on the manifest (use a validation set) and only printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from efficient_asr import load_transcriber
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.evaluation.result import Result
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.reporting.figures import COLOURS, pyplot, save_figure
from efficient_asr.reporting.tables import markdown_table
from efficient_asr.settings.options import at_least, measuring_parser, parse_columns
from efficient_asr.techniques.early_exit.heads import NEVER, RULES
from efficient_asr.techniques.early_exit.sweep import Sweep, exit_heads, sweep
from efficient_asr.utils.devices import choose_device, devices_to_time
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text


def parse() -> argparse.Namespace:
    parser = measuring_parser(__doc__, repeats=1)
    parser.add_argument("--rule", required=True, choices=[rule for rule in RULES if rule != "none"])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[])
    parser.add_argument(
        "--patience", type=at_least(1), default=1, help="consecutive heads that must meet the threshold (patience)"
    )
    parser.add_argument(
        "--layers",
        type=at_least(1),
        nargs="+",
        help="use only the heads on these layers and the last one (default: all)",
    )
    parser.add_argument(
        "--calibrate_mean_layer", type=float, help="choose the threshold that gives this mean exit layer"
    )
    parser.add_argument(
        "--calibrate_wer_loss_percent",
        type=float,
        help="choose the threshold that increases the WER by at most this many points",
    )
    parser.add_argument("--out", type=Path, default=Path("output/sweep"), help="folder for results, table and plot")
    parser.add_argument("--experiment", default="sweep", help="prefix of the names of the results")
    parser.add_argument("--label", default="", help="prefix of the names of the variants, e.g. 'two-step '")
    parser.add_argument("--corpus", help="corpus name in the tables (default: name of the manifest's folder)")
    parser.add_argument("--split", help="split name in the tables (default: name of the manifest)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    calibrating = args.calibrate_mean_layer is not None or args.calibrate_wer_loss_percent is not None
    both = args.calibrate_mean_layer is not None and args.calibrate_wer_loss_percent is not None
    if both or bool(args.thresholds) == calibrating:
        raise UserError("give either --thresholds or one of --calibrate_mean_layer and --calibrate_wer_loss_percent")
    check_writable(args.out, "--out")
    device = choose_device(args.device)
    args.runtime_devices = devices_to_time(args.runtime_devices, device, "--runtime_devices")
    transcriber = load_transcriber(args.model)
    heads = exit_heads(transcriber.model if isinstance(transcriber, CTCTranscriber) else None)
    heads.keep(args.layers or heads.layers)
    for threshold in args.thresholds or [NEVER[args.rule]]:
        heads.set_rule(args.rule, threshold, args.patience)
    heads.check_patience()
    columns = parse_columns(args.columns)
    benchmark = Benchmark.from_manifest(
        args.manifest,
        args.corpus,
        args.split,
        args.normaliser or transcriber.normaliser,
        columns,
        args.skip_bad,
        args.out / f"{args.experiment}.skipped.jsonl",
        check_audio="samples",
    )
    transcriber.to(device)
    found = sweep(transcriber.model, benchmark)
    if calibrating:
        wanted = {"mean_layer": args.calibrate_mean_layer, "wer_loss_percent": args.calibrate_wer_loss_percent}
        args.thresholds = [found.choose_threshold(args.rule, **wanted, patience=args.patience)]
        args.repeats = 0
    results = [
        measure(args, transcriber, benchmark, found, threshold) for threshold in [NEVER[args.rule], *args.thresholds]
    ]
    rows = [row(result) for result in results]
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    print(table)
    if calibrating:
        print(f"calibrated on {args.manifest}: --exit_rule {args.rule} --exit_threshold {args.thresholds[0]:.6g}")
        return
    for result in results:
        result.save(args.out)
    stem = args.out / f"{args.experiment}_{args.rule}-{benchmark.split}"
    atomic_write_text(Path(f"{stem}.md"), table + "\n")
    draw(results, args.rule, Path(f"{stem}.png"))
    print(f"results, table and plot: {args.out}, {stem}.md, {stem}.png")


def measure(
    args: argparse.Namespace, transcriber: object, benchmark: Benchmark, found: Sweep, threshold: float
) -> Result:
    """Return the Result of one threshold: the scores of the sweep, and the measured runtime."""
    transcriber.model.head.set_rule(args.rule, threshold, args.patience)
    out = found.exits(args.rule, threshold, args.patience)
    rule = {"exit_rule": args.rule, "exit_threshold": threshold, "exit_patience": args.patience}
    name = args.label + transcriber.model.label
    return evaluate(
        transcriber, benchmark, batch_size=args.batch_size, repeats=args.repeats, recipe="early_exit",
        experiment=f"{args.experiment}_{transcriber.model.head.label.replace(' ', '_')}-{benchmark.split}",
        technique=transcriber.model.technique, variant=name,
        details=rule | found.details(out), hparams={key: str(value) for key, value in vars(args).items()},
        records=found.records(benchmark, args.rule, out), devices=args.runtime_devices,
    )  # fmt: skip


def row(result: Result) -> dict[str, str]:
    """Return one row of the table, by column."""
    cells = {
        "threshold": f"{result.details['exit_threshold']:.4g}",
        "mean layer": f"{result.details['mean_exit_layer']:.2f}",
        "WER %": f"{result.wer_percent:.2f}",
        "GMACs": f"{result.macs_g:.3f}",
    }
    if result.details["exit_threshold"] == NEVER[result.details["exit_rule"]]:
        cells["threshold"] = "never"
    for entry in result.runtimes:
        cells[f"{entry['device']} s, batch {entry['batch_size']}"] = f"{entry['runtime_s']:.2f}"
    return cells


def draw(results: list[Result], rule: str, path: Path) -> None:
    """Draw WER against mean exit layer, MACs and CPU time."""
    costs = {
        "mean exit layer": [r.details["mean_exit_layer"] for r in results],
        "GMACs per utterance": [r.macs_g for r in results],
    }
    for size in sorted({entry["batch_size"] for r in results for entry in r.runtimes if entry["device"] == "cpu"}):
        costs[f"CPU seconds, batch {size}"] = [r.runtime("cpu", size)["runtime_s"] for r in results]
    figure, axes = pyplot.subplots(1, len(costs), figsize=(4.2 * len(costs), 4), sharey=True, squeeze=False)
    for ax, (label, values) in zip(axes[0], costs.items(), strict=True):
        order = sorted(range(len(values)), key=values.__getitem__)
        ax.plot([values[i] for i in order], [results[i].wer_percent for i in order], "o-", color=COLOURS[1])
        for value, result in zip(values, results, strict=True):
            ax.annotate(
                row(result)["threshold"],
                (value, result.wer_percent),
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=8,
            )
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("WER %")
    kind = "synthetic speech" if results[0].synthetic else "real speech"
    figure.suptitle(f"{results[0].corpus}/{results[0].split} ({kind}), early exit by {rule}", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(exit_code(main))
