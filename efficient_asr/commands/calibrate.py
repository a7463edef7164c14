"""Write a copy of a Whisper that encodes each utterance on its own length, with cached silence behind it.

    efficient-asr calibrate WHISPER --out FOLDER
    efficient-asr calibrate WHISPER --manifest recordings.jsonl --out FOLDER

No training and no data are needed. With recordings, the cached silence is closer to what the model would compute: 16 recordings
of a few seconds are enough, and their texts are not used. The folder is used like the original; `--encoder_padding 30` turns the
cache off again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from efficient_asr.data import load_row, read_manifest
from efficient_asr.models.hub import model_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.options import at_least, parse_columns
from efficient_asr.techniques.silence_cache.cache import GROUP, SINKS, SilenceCache
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.utils.errors import UserError, check_writable


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory, hub id, or model folder of a recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--manifest", type=Path, help="JSON lines: id, audio, duration (default: synthetic noise)")
    parser.add_argument("--columns", default="{}", help="custom column names, e.g. '{audio: path}'")
    parser.add_argument("--recordings", type=at_least(1), default=16, help="how many of them to use (default 16)")
    parser.add_argument("--padding_s", type=float, default=0.2, help="real silence behind each utterance (default 0.2)")
    parser.add_argument(
        "--group", type=at_least(1), default=GROUP, help=f"silent positions per key (default {GROUP}; 1 keeps all)"
    )
    parser.add_argument(
        "--sinks", type=at_least(0),
        help=f"silent positions in no group, those that the decoder attends to most (default {SINKS})",
    )  # fmt: skip
    parser.add_argument("--language", help="language of the recordings, for models with language experts")
    args = parser.parse_args(argv)
    if args.sinks and args.group == 1:
        raise UserError("--sinks: with --group 1, no position is in a group; leave it out")
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; choose another folder")
    check_writable(args.out.parent, "--out")
    model = Whisper.from_source(model_source(args.model), with_padding=False)
    wavs = None
    if args.manifest is not None:
        rows = read_manifest(args.manifest, columns=parse_columns(args.columns), need_text=False)
        wavs = [load_row(row) for row in list(rows)[: args.recordings]]
    language = normalise_or_keep(args.language)
    sinks = SINKS if args.sinks is None else args.sinks
    model.encoder_padding = SilenceCache.calibrate(model, wavs, args.padding_s, args.group, language, sinks)
    model.save(args.out, getattr(model.network.config, "about", None))
    print(f"model with {model.encoder_padding.label}: {args.out}")
