"""Command line options shared by several scripts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ruamel.yaml

from efficient_asr.text.normalise import NORMALISERS
from efficient_asr.utils.errors import UserError

BACKENDS = ("torch", "onnx", "ctranslate2")
QUANTISATIONS = ("decoder-int8", "encoder-int8", "int8")
_WHISPER_OPTIONS = (
    "task", "num_beams", "length_penalty", "max_new_tokens", "max_tokens_per_s", "timestamps", "temperatures",
    "compression_ratio_threshold", "logprob_threshold", "suppress", "no_speech_threshold", "overlap_s", "long_audio_batch",
    "encoder_padding", "padding_s", "quantise", "backend", "retry_logprob", "assistant",
)  # fmt: skip
_DECODING = (
    "task", "num_beams", "length_penalty", "max_new_tokens", "max_tokens_per_s", "timestamps", "temperatures", "suppress",
    "no_speech_threshold",
)  # fmt: skip


def is_selection(mode: object) -> bool:
    """Return whether a quantisation is the file of a selection of layers, not a name."""
    return str(mode).endswith(".json")


def quantisation(text: str) -> str:
    """Return a mode of int8 quantisation, or the path of a selection of layers, from the command line."""
    if text not in QUANTISATIONS and not is_selection(text):
        raise argparse.ArgumentTypeError(
            f"invalid choice: '{text}' (choose from {', '.join(QUANTISATIONS)}, FILE.json)"
        )
    return text


def measuring_parser(description: str, repeats: int | None) -> argparse.ArgumentParser:
    """Return a parser with the shared options; `repeats` is the default number of timed runs, None to omit the timing options."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines: id, audio, duration, text")
    parser.add_argument("--columns", default="{}", help="custom column names, e.g. '{audio: path, text: sentence}'")
    parser.add_argument(
        "--normaliser",
        choices=sorted(NORMALISERS),
        help="normaliser of references and hypotheses (default: plain for CTC models; "
        "for Whisper its own: whisper if the audio is English, otherwise multilingual)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU if there is one")
    if repeats is not None:
        parser.add_argument(
            "--runtime_devices", nargs="+", help="devices to time: cpu, cuda, or all (default: that of --device)"
        )
        parser.add_argument(
            "--batch_size", type=at_least(1), default=8, help="runtimes are measured at batch size 1 and at this size"
        )
        parser.add_argument("--repeats", type=at_least(0), default=repeats, help="number of timed runs; 0 skips timing")
    parser.add_argument(
        "--skip_bad",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        help="skip bad lines instead of stopping",
    )
    return parser


def yes_or_no(value: str) -> bool:
    """Parse True or False, as in the recipes."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r} is not True or False")
    return value.lower() == "true"


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers with a lower limit."""

    def read(value: str) -> int:
        if not value.lstrip("-").isdigit() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not an integer >= {least}")
        return int(value)

    return read


def parse_columns(text: str) -> Any:
    """Parse the value of `--columns`.

    Raises
    ------
    UserError
        If it is not valid YAML.
    """
    try:
        return ruamel.yaml.YAML(typ="safe").load(text)
    except ruamel.yaml.YAMLError:
        raise UserError(
            f"--columns: cannot parse {text!r}; use a map such as '{{audio: path, text: sentence}}'"
        ) from None


def add_lm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for decoding CTC models with a language model."""
    group = parser.add_argument_group("language model, for CTC models")
    group.add_argument("--lm", help="ARPA file or kenlm binary")
    group.add_argument("--lm_alpha", type=float, help="language model weight (default 0.5)")
    group.add_argument("--lm_beta", type=float, help="reward per word (default 1.0)")
    group.add_argument("--lm_beam_size", type=at_least(1), help="hypotheses kept per frame (default 100)")
    group.add_argument(
        "--lm_case", choices=["lower", "upper"], help="case of the language model's words (default lower)"
    )


def lm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the language model options that were given, for `load_transcriber`.

    Raises
    ------
    UserError
        If options are given without a language model.
    """
    names = ("alpha", "beta", "beam_size", "case")
    given = {name: getattr(args, f"lm_{name}") for name in names if getattr(args, f"lm_{name}") is not None}
    if given and not args.lm:
        raise UserError(f"--lm_{next(iter(given))} requires a language model; pass one with --lm")
    return {"lm_path": args.lm} | given if args.lm else {}


def add_whisper_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for decoding with Whisper, and for long audio."""
    group = parser.add_argument_group("Whisper, alone or combined with other models")
    group.add_argument(
        "--language",
        help="language of the audio (ISO 639-1), or 'manifest' to use that of each line; detected if not given",
    )
    group.add_argument(
        "--long_audio", choices=("pauses", "overlap", "sequential"), default="pauses", help="how to split long audio"
    )
    group.add_argument("--task", choices=("transcribe", "translate"), help="translate: into English")
    group.add_argument("--num_beams", type=at_least(1), help="beam search; 1 (the default) is greedy")
    group.add_argument("--length_penalty", type=float, help="length penalty of beam search")
    group.add_argument("--max_new_tokens", type=at_least(1), help="maximum number of tokens per transcript")
    group.add_argument(
        "--max_tokens_per_s", type=float, help="end a transcript after 10 tokens plus this many per second of audio"
    )
    group.add_argument("--timestamps", action="store_true", default=None, help="predict timestamps")
    group.add_argument("--temperatures", type=float, nargs="+",
        help="fallback temperatures; default: none for short audio, Whisper's own (0 0.2 0.4 0.6 0.8 1) for pieces of long audio",
    )  # fmt: skip
    group.add_argument("--compression_ratio_threshold", type=float,
        help="try the next temperature if zlib compresses the text by more than this (it repeats itself; default 2.4)",
    )  # fmt: skip
    group.add_argument("--logprob_threshold", type=float,
        help="try the next temperature if the mean log-probability is lower (default -1.0)",
    )  # fmt: skip
    group.add_argument(
        "--suppress", type=yes_or_no, help="suppress the tokens listed in the model's configuration (default True)"
    )
    group.add_argument(
        "--overlap_s", type=float, help="seconds shared by neighbouring windows with --long_audio overlap (default 5.0)"
    )
    group.add_argument(
        "--long_audio_batch", type=at_least(1), help="pieces of one recording transcribed together (default 8)"
    )
    group.add_argument("--no_speech_threshold", type=float,
        help="return empty text if the probability of silence is higher (Whisper's own: 0.6)",
    )  # fmt: skip
    group.add_argument(
        "--encoder_padding",
        help="what to encode behind the audio: seconds of silence (default 30: the whole window), or the name of a technique "
        "(docs/deployment.md)",
    )
    group.add_argument(
        "--padding_s", type=float, help="real silence, if --encoder_padding is not a number (default 0.2)"
    )
    group.add_argument("--retry_logprob", type=float,
        help="with less padding: encode the whole window if the mean log-probability is lower (default -1.0; =-inf: never)",
    )  # fmt: skip
    group.add_argument("--quantise", type=quantisation, metavar=f"{{{','.join(QUANTISATIONS)},FILE.json}}",
        help="int8 weights, on the CPU: decoder-int8 keeps the WER best; a file of scripts/search_int8.py selects layers",
    )  # fmt: skip
    group.add_argument("--assistant",
        help="smaller Whisper that proposes tokens, which the model checks: the same text, sooner, if one utterance is decoded "
        "at a time (long audio: --long_audio_batch 1)",
    )  # fmt: skip
    group.add_argument(
        "--backend", choices=BACKENDS, help="engine that runs a Whisper (default: that of a converted model, or torch)"
    )


def decoding_changes(args: argparse.Namespace) -> list[str]:
    """Return labels of the options that change what a Whisper writes, such as `num_beams 5`, for the names of variants."""
    return [f"{name} {getattr(args, name)}" for name in _DECODING if getattr(args, name) is not None]


def whisper_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the Whisper options that were given, for `load_transcriber`."""
    given = {name: getattr(args, name) for name in _WHISPER_OPTIONS if getattr(args, name) is not None}
    return {"language": args.language, "long_audio": args.long_audio, **given}
