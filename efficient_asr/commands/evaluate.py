"""Evaluate a model on a manifest: WER, MACs and runtime. Writes the Result and its transcripts.

    efficient-asr evaluate MODEL --manifest test.jsonl --out result.json
    efficient-asr evaluate MODEL --manifest test.jsonl --lm 4gram.arpa --out result.json
    efficient-asr evaluate WHISPER --manifest test.jsonl --language en --device cpu --out result.json

MODEL is the model folder written by a recipe (<output_folder>/model), or a Whisper directory or hub id. Texts are normalised by
default with `plain` for CTC models and with Whisper's own normaliser for Whisper. Runtimes are measured on the device that the
model runs on. Rerun the command to resume an interrupted evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from efficient_asr import load_transcriber
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate, score
from efficient_asr.evaluation.runtime import limit_convolution_cache
from efficient_asr.models.backends import own_folder
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint, read_config, with_contents
from efficient_asr.settings.options import (
    add_lm_options,
    add_whisper_options,
    at_least,
    decoding_changes,
    lm_options,
    measuring_parser,
    parse_columns,
    whisper_options,
)
from efficient_asr.utils.devices import choose_device, devices_to_time
from efficient_asr.utils.errors import UserError, check_writable


def _about(source: str) -> dict[str, Any]:
    """Return what is known of how a model was made."""
    folder = own_folder(source)
    return read_config(folder).get("about", {}) if (Path(folder) / "config.json").is_file() else {}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = measuring_parser(__doc__, repeats=3)
    parser.add_argument(
        "--out", type=Path, default=Path("result.json"), help="file for the Result (default: result.json)"
    )
    add_lm_options(parser)
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: torch's)")
    parser.add_argument("--no_macs", action="store_true", help="do not count MACs")
    add_whisper_options(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.out.suffix != ".json":
        raise UserError(f"--out: {args.out} must end in .json")
    device = choose_device(args.device)
    devices = devices_to_time(args.runtime_devices, device, "--runtime_devices")
    check_writable(args.out.parent, "--out")
    lm_given = lm_options(args)
    source = model_source(args.model)
    transcriber = load_transcriber(source, **whisper_options(args))
    benchmark = Benchmark.from_manifest(
        args.manifest,
        normaliser=args.normaliser or transcriber.normaliser,
        columns=parse_columns(args.columns),
        skip_bad=args.skip_bad,
        skipped_file=args.out.with_suffix(".skipped.jsonl"),
        check_audio="samples",
        language=args.language,
        task=args.task or "transcribe",
    )
    limit_convolution_cache(len(benchmark.rows))
    with_lm = load_transcriber(source, **lm_given) if lm_given else None
    about = _about(source)
    lm = with_lm.language_model.identity if with_lm else None
    changed = transcriber.changes
    records = score(
        transcriber, benchmark, with_lm, not args.no_macs, args.out.with_suffix(""),
        f"{fingerprint(source)} {with_contents(whisper_options(args))} {lm}", device,
    )  # fmt: skip
    result = evaluate(
        transcriber,
        benchmark,
        lm_transcriber=with_lm,
        batch_size=args.batch_size,
        measure_macs=not args.no_macs,
        repeats=args.repeats,
        experiment=args.out.stem,
        recipe=about.get("recipe"),
        technique=transcriber.technique if changed else about.get("technique", "none"),
        variant=" + ".join([about.get("variant", args.model), *changed, *decoding_changes(args)]),
        details=about.get("details"),
        lm=with_lm.language_model.config if with_lm else None,
        records=records,
        devices=devices,
        hparams={key: str(value) for key, value in vars(args).items()},
    )
    result.save(args.out)
    records.discard_parts()
    print(result.summary())
    print(f"result: {args.out}")
