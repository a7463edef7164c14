"""efficient_asr.settings.yaml.options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ruamel.yaml

from efficient_asr.text.normalise import NORMALISERS
from efficient_asr.utils.errors import UserError

_WHISPER_OPTIONS = (
    "task", "num_beams", "length_penalty", "max_new_tokens", "max_tokens_per_s", "timestamps", "temperatures",
    "compression_ratio_threshold", "logprob_threshold", "suppress", "no_speech_threshold", "overlap_s", "long_audio_batch",
)  # fmt: skip


def measuring_parser(description: str, repeats: int | None) -> argparse.ArgumentParser:
    """Return a parser of the options that these commands share; `repeats` is the default of timed runs, None for none at all."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines: id, audio, duration, text")
    parser.add_argument("--columns", default="{}", help="other column names, e.g. '{audio: path, text: sentence}'")
    parser.add_argument(
        "--normaliser", default="plain", choices=sorted(NORMALISERS), help="of references and hypotheses"
    )
    if repeats is not None:
        parser.add_argument(
            "--batch_size", type=at_least(1), default=8, help="runtimes are taken at batch 1 and at this size"
        )
        parser.add_argument("--repeats", type=at_least(0), default=repeats, help="timed runs; 0 leaves runtimes out")
    parser.add_argument(
        "--skip_bad",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        help="leave bad lines out instead of stopping",
    )
    return parser


def yes_or_no(value: str) -> bool:
    """Read True or False, as the recipes take it."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r} is not True or False")
    return value.lower() == "true"


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers with a lower limit."""

    def read(value: str) -> int:
        if not value.lstrip("-").isdigit() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least {least}")
        return int(value)

    return read


def parse_columns(text: str) -> Any:
    """Read the value of `--columns`.

    Raises
    ------
    UserError
        Where it is not YAML.
    """
    try:
        return ruamel.yaml.YAML(typ="safe").load(text)
    except ruamel.yaml.YAMLError:
        raise UserError(f"--columns: {text!r} cannot be read; write '{{audio: path, text: sentence}}'") from None


def add_lm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of decoding with a language model, for CTC models."""
    group = parser.add_argument_group("language models, for CTC models")
    group.add_argument("--lm", help="ARPA file or kenlm binary")
    group.add_argument("--lm_alpha", type=float, help="its weight (0.5)")
    group.add_argument("--lm_beta", type=float, help="reward for each word (1.0)")
    group.add_argument("--lm_beam_size", type=at_least(1), help="hypotheses kept a frame (100)")
    group.add_argument("--lm_case", choices=["lower", "upper"], help="how it writes its words (lower)")


def lm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those that were given, for `load_transcriber`.

    Raises
    ------
    UserError
        For options of a language model without one.
    """
    names = ("alpha", "beta", "beam_size", "case")
    given = {name: getattr(args, f"lm_{name}") for name in names if getattr(args, f"lm_{name}") is not None}
    if given and not args.lm:
        raise UserError(f"--lm_{next(iter(given))}: there is no language model; name one with --lm")
    return {"lm_path": args.lm} | given if args.lm else {}


def add_whisper_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of decoding with Whisper, and of long audio."""
    group = parser.add_argument_group("Whisper, alone or with others")
    group.add_argument(
        "--language",
        help="language of the audio (ISO 639-1), or 'manifest': what each line says; detected where not given",
    )
    group.add_argument(
        "--long_audio", choices=("pauses", "overlap", "sequential"), default="pauses", help="how long audio is cut"
    )
    group.add_argument("--task", choices=("transcribe", "translate"), help="translate: into English")
    group.add_argument("--num_beams", type=at_least(1), help="beam search; 1 (the default) is greedy")
    group.add_argument("--length_penalty", type=float, help="of beam search")
    group.add_argument("--max_new_tokens", type=at_least(1), help="most tokens of a transcript")
    group.add_argument(
        "--max_tokens_per_s", type=float, help="ends a transcript after 10 tokens and so many a second of audio"
    )
    group.add_argument("--timestamps", action="store_true", default=None, help="predict timestamps")
    group.add_argument("--temperatures", type=float, nargs="+",
        help="fallback; by default none for short audio, and Whisper's own (0 0.2 0.4 0.6 0.8 1) for pieces of long audio",
    )  # fmt: skip
    group.add_argument("--compression_ratio_threshold", type=float,
        help="a text that zlib shortens more than this repeats itself: the next temperature is tried (2.4)",
    )  # fmt: skip
    group.add_argument(
        "--logprob_threshold", type=float, help="so is it where the mean log-probability is lower (-1.0)"
    )
    group.add_argument(
        "--suppress", type=yes_or_no, help="keep the model from tokens that its configuration bans (True)"
    )
    group.add_argument("--overlap_s", type=float, help="seconds that neighbouring windows share with overlap (5.0)")
    group.add_argument("--long_audio_batch", type=at_least(1), help="pieces of one recording transcribed together (8)")
    group.add_argument(
        "--no_speech_threshold", type=float, help="empty text where silence is likelier (Whisper's own: 0.6)"
    )


def whisper_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those that were given, for `load_transcriber`."""
    given = {name: getattr(args, name) for name in _WHISPER_OPTIONS if getattr(args, name) is not None}
    return {"language": args.language, "long_audio": args.long_audio, **given}
