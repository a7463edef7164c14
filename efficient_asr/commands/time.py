"""Measure runtimes only, and add them to a result: on another device, or without scoring again.

    efficient-asr time MODEL result.json --manifest test.jsonl --device cuda

The result must have been measured on the same manifest. Runtimes of the same device, batch size and decoding are replaced; all
other fields stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch

from efficient_asr import load_transcriber
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import measure_runtimes
from efficient_asr.evaluation.result import Result, digest_of_settings
from efficient_asr.evaluation.runtime import limit_convolution_cache
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.settings.options import (
    add_lm_options,
    add_whisper_options,
    at_least,
    lm_options,
    measuring_parser,
    parse_columns,
    whisper_options,
)
from efficient_asr.utils.devices import choose_device, devices_to_time
from efficient_asr.utils.errors import UserError, check_writable


def check_same(result: Result, path: Path, transcriber: Transcriber, with_lm: Transcriber | None) -> None:
    """Reject a model or options other than those of the result.

    Raises
    ------
    UserError
        Saying what differs.
    """
    settings = result.provenance.get("settings")  # absent in results of former versions
    if result.parameters != transcriber.parameters_count():
        raise UserError(f"{path} was measured with another model (it has {result.parameters} parameters)")
    if settings is not None and settings != digest_of_settings(transcriber.settings):
        raise UserError(f"{path} was measured with another model or other decoding options, such as --language")
    if with_lm is not None and result.lm != with_lm.language_model.config:
        raise UserError(f"{path} was measured with another language model: {result.lm}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = measuring_parser(__doc__, repeats=3)
    parser.add_argument("result", type=Path, metavar="RESULT", help="file to add the runtimes to")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: torch's)")
    add_lm_options(parser)
    add_whisper_options(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    result = Result.load(args.result)
    check_writable(args.result.absolute().parent, "RESULT")
    given = lm_options(args)
    benchmark = Benchmark.from_manifest(
        args.manifest, result.corpus, result.split, args.normaliser or result.normaliser, parse_columns(args.columns),
        args.skip_bad, check_audio="samples", language=args.language, task=args.task or "transcribe",
    )  # fmt: skip
    if benchmark.hash != result.benchmark_hash:
        raise UserError(
            f"{args.result} was not measured on the utterances of {args.manifest}, or with another normaliser"
        )
    limit_convolution_cache(len(benchmark.rows))
    transcriber = load_transcriber(args.model, **whisper_options(args))
    with_lm = load_transcriber(args.model, **given) if args.lm else None
    check_same(result, args.result, transcriber, with_lm)
    devices = devices_to_time(args.runtime_devices, device, "--runtime_devices")
    found = measure_runtimes(transcriber, with_lm, benchmark, args.batch_size, args.repeats, devices)
    result = Result.load(args.result)  # another command may have added to it meanwhile
    measured = {(entry["device"], entry["batch_size"], entry["lm"]) for entry in found}
    kept = [r for r in result.runtimes if (r["device"], r["batch_size"], r["lm"]) not in measured]
    result.runtimes = sorted([*kept, *found], key=lambda r: (r["device"], r["lm"], r["batch_size"]))
    result.save_fields()
    print(f"{result.summary()}\nresult: {args.result}")
