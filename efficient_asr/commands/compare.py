"""Compare models on the same recordings: WER against the first one, MACs, and times in interleaved rounds.

    efficient-asr compare base=WHISPER "fast=WHISPER;encoder_padding=silence_cache;quantise=decoder-int8" --language en \\
        --manifest a.jsonl b.jsonl --out compared.json
    efficient-asr compare full=CTC_MODEL early=EARLY_EXIT_MODEL --manifest test.jsonl --out compared.json

A system is NAME=MODEL, with options of `load_transcriber` behind semicolons. Every utterance is transcribed once, alone, for
the WER. MACs are counted on the first `--timed` utterances of each manifest, and these are timed at batch 1 and 8, one system
after the other, `--rounds` times; medians are reported. Rerun the command to continue, also with further systems: what was
transcribed before is kept in `output/compare`. The times are always those of one run. In a page of this project,
`<!-- compared NAME -->` shows results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.comparison import compare
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import local_config
from efficient_asr.reporting.comparisons import draw_comparison, table_of
from efficient_asr.settings.command_line import read_value
from efficient_asr.settings.options import at_least, parse_columns
from efficient_asr.text.normalise import NORMALISERS
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.files import atomic_write_text


def named(text: str) -> tuple[str, tuple[str, dict[str, Any]]]:
    """Return name, model and options of `NAME=MODEL;option=value;...`."""
    name, equals, rest = text.partition("=")
    model, *pairs = rest.split(";")
    if not (name and equals and model) or not all("=" in pair for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL or NAME=MODEL;option=value")
    return name, (model, {key: read_value(value) for key, _, value in (pair.partition("=") for pair in pairs)})


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", type=named, nargs="+", metavar="NAME=MODEL", help="models; the reference first")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON lines: id, audio, text, language")
    parser.add_argument("--columns", default="{}", help="custom column names, e.g. '{audio: path, text: sentence}'")
    parser.add_argument("--language", help="language of the audio; detected if not given")
    parser.add_argument(
        "--normaliser",
        choices=sorted(NORMALISERS),
        help="of references and hypotheses (default: plain for CTC models alone, otherwise Whisper's own, by language)",
    )
    parser.add_argument(
        "--timed",
        type=at_least(0),
        default=8,
        help="utterances of each manifest that are timed and counted (default 8)",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds of timing (default 3)")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        raise UserError(f"--out: {args.out} must end in .json")
    names = [name for name, _ in args.systems]
    if len({*names}) < len(names):
        raise UserError("NAME=MODEL: two systems have the same name")
    check_writable(args.out.absolute().parent, "--out")
    kinds = {str(local_config(model_source(model)).get("kind")) for _, (model, _) in args.systems}
    normaliser = args.normaliser or ("plain" if all(kind.startswith("ctc") for kind in kinds) else None)
    benchmarks = [
        Benchmark.from_manifest(
            path, normaliser=normaliser, language=args.language, columns=parse_columns(args.columns), skip_bad=None
        )
        for path in args.manifest
    ]
    result = compare(dict(args.systems), benchmarks, args.language, args.timed, args.rounds)
    atomic_write_text(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table_of(result))
    picture = draw_comparison(result, args.out.with_suffix(".png"))
    print(f"result: {args.out}" + (f"\nplot: {picture}" if picture else ""))
