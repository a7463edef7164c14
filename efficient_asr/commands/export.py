"""Export a trained model for another library.

    efficient-asr export CTC_MODEL --to transformers --out exported      # AutoModelForCTC, AutoProcessor; logits are compared
    efficient-asr export CTC_MODEL --to speechbrain --out exported       # EncoderASR.from_hparams; any technique
    efficient-asr export WHISPER --to faster-whisper --out exported --quantization int8

A Whisper fine-tuned here needs no export for transformers: its model folder is a Hugging Face directory already.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.sources import read_config, resolve_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError, check_writable

MOST_DIFFERENT = 1e-3  # logits of an exported model, which differ by rounding
TARGETS = ("transformers", "speechbrain", "faster-whisper")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model folder written by a recipe, or a Whisper")
    parser.add_argument("--to", choices=TARGETS, required=True, help="library that will run the model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--quantization", help="number format for faster-whisper, such as int8 (default: float32)")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; choose another folder")
    if args.quantization and args.to != "faster-whisper":
        raise UserError("--quantization requires --to faster-whisper")
    check_writable(args.out.parent, "--out")
    source = resolve_source(args.model)
    if args.to == "faster-whisper":
        from efficient_asr.models.interchange.faster_whisper import export_to_faster_whisper

        export_to_faster_whisper(Whisper.from_source(source), args.out, args.quantization)
    else:
        if read_config(source).get("kind") != "ctc":
            raise UserError(f"{args.model} is not a CTC model of efficient_asr, which --to {args.to} requires")
        model = CTCModel.load(source)
        if args.to == "speechbrain":
            from efficient_asr.models.interchange.speechbrain import export_to_speechbrain

            export_to_speechbrain(model, args.out)
        else:
            from efficient_asr.models.interchange.transformers import export_to_transformers, largest_difference

            export_to_transformers(model, args.out)
            difference = largest_difference(model, args.out)
            print(f"largest difference of the logits: {difference:.1e}")
            if difference > MOST_DIFFERENT:
                shutil.rmtree(args.out)
                raise UserError(
                    f"the exported model differs from {args.model}; the folder was removed. This is a bug, please report it"
                )
    print(f"exported for {args.to}: {args.out}")
