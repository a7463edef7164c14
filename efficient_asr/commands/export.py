"""Export a trained model for another library or engine.

    efficient-asr export CTC_MODEL --to transformers --out exported      # AutoModelForCTC, AutoProcessor; logits are compared
    efficient-asr export CTC_MODEL --to speechbrain --out exported       # EncoderASR.from_hparams; any technique
    efficient-asr export CTC_MODEL --to onnx --out exported              # model.onnx; logits are compared
    efficient-asr export WHISPER --to transformers --out exported        # a plain Hugging Face directory
    efficient-asr export WHISPER --to ctranslate2 --out exported --quantise int8 --manifest test.jsonl --language en
    efficient-asr export WHISPER --to onnx --out exported --quantise decoder-int8 --manifest test.jsonl --language en

`load_transcriber` and all commands open an exported Whisper like any other model, and so does faster-whisper what was exported
to CTranslate2. A padding of the model (a silence cache, its own length) goes along. With --manifest, an exported Whisper
transcribes the utterances of a manifest, and so does the original: in float32 the transcripts must be the same, in other formats
the WER may rise by half a point. Otherwise the command says so and fails; the folder stays.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path

from efficient_asr.data import Row, load_row, read_manifest
from efficient_asr.evaluation.wer import count_errors, error_rate_percent
from efficient_asr.models.backends import convert
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import local_config
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.options import QUANTISATIONS, at_least
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError, check_writable

MOST_DIFFERENT = 1e-3  # logits of an exported model, which differ by rounding
MOST_WER_PERCENT = 0.5  # that a quantised export may lose
TARGETS = ("transformers", "speechbrain", "ctranslate2", "onnx")
FORMER = {"faster-whisper": "ctranslate2", "hf": "transformers"}  # other names of targets


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model folder written by a recipe, or a Whisper")
    parser.add_argument(
        "--to", choices=(*TARGETS, *FORMER), required=True,
        help="library that will run the model; hf is transformers, and faster-whisper runs ctranslate2",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument(
        "--quantise", "--quantization", choices=QUANTISATIONS,
        help="int8 weights, for onnx and ctranslate2 (default: float32); CTranslate2 has int8 for all of the model only",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", type=Path, help="utterances on which an exported Whisper is compared with the original"
    )
    parser.add_argument("--language", default="en", help="their language (default en)")
    parser.add_argument("--utterances", type=at_least(1), default=50, help="how many of them (default 50)")
    args = parser.parse_args(argv)
    args.to = FORMER.get(args.to, args.to)
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; choose another folder")
    if args.quantise and args.to not in ("ctranslate2", "onnx"):
        raise UserError("--quantise requires --to onnx or ctranslate2")
    check_writable(args.out.parent, "--out")
    source = model_source(args.model)
    is_ctc = local_config(source).get("kind") == "ctc"
    if args.manifest is not None and is_ctc:
        raise UserError("--manifest compares Whispers; the logits of CTC models are compared without it")
    rows = _rows_to_compare(args) if args.manifest is not None else []
    if is_ctc:
        _export_ctc(CTCModel.load(source), args)
    else:
        _export_whisper(source, args)
    print(f"exported for {args.to}: {args.out}")
    if args.manifest is not None:
        print(compare(source, args, rows))


def _rows_to_compare(args: argparse.Namespace) -> list[Row]:
    """Return the utterances on which the export is compared with the original, before anything is exported.

    Raises
    ------
    UserError
        If the manifest has none that fit into a window.
    """
    rows = [row for row in read_manifest(args.manifest) if row["duration"] < 29.5][: args.utterances]
    if not rows:
        raise UserError(f"--manifest: {args.manifest} has no utterances shorter than 29.5 s")
    return rows


def _export_whisper(source: str, args: argparse.Namespace) -> None:
    """Export a Whisper.

    Raises
    ------
    UserError
        If the library cannot run it.
    """
    if args.to == "speechbrain":
        raise UserError(f"{args.model} is not a CTC model of efficient_asr, which --to {args.to} requires")
    model = Whisper.from_source(source)
    if args.manifest is not None:
        model.labels.check_language(normalise_or_keep(args.language))
    if args.to != "transformers":
        convert(model, args.out, args.to, args.quantise)
        return
    plain = model.plain()
    with plain.whole_window():  # what stands in the place of padding is not known there
        plain.save(args.out)


def _export_ctc(model: CTCModel, args: argparse.Namespace) -> None:
    """Export a CTC model.

    Raises
    ------
    UserError
        If the library cannot run it, or the logits differ.
    """
    if args.to == "ctranslate2":
        raise UserError(
            f"CTranslate2 runs Whispers, and {args.model} is a CTC model; use transformers, speechbrain or onnx"
        )
    if args.to == "speechbrain":
        from efficient_asr.models.interchange.speechbrain import export_to_speechbrain

        export_to_speechbrain(model, args.out)
        return
    if args.quantise:
        raise UserError("--quantise: int8 weights are for Whispers; leave it out for a CTC model")
    library = "onnx" if args.to == "onnx" else "transformers"
    module = importlib.import_module(f"efficient_asr.models.interchange.{library}")
    getattr(module, f"export_to_{library}")(model, args.out)
    difference = module.largest_difference(model, args.out)
    print(f"largest difference of the logits: {difference:.1e}")
    if difference > MOST_DIFFERENT:
        shutil.rmtree(args.out)
        raise UserError(
            f"the exported model differs from {args.model}; the folder was removed. This is a bug, please report it"
        )


def compare(source: str, args: argparse.Namespace, rows: list[Row]) -> str:
    """Transcribe `rows` with the original and with its export; return a sentence about the difference.

    What transformers runs encodes the whole window, so the original does too.

    Raises
    ------
    UserError
        If the export is not as good.
    """
    from efficient_asr.commands.peers import ours, transformers_pipeline

    wavs = [load_row(row) for row in rows]
    if args.to == "transformers":
        original = ours(source, args.language, 1, args.out, encoder_padding=30)(wavs)
        exported = transformers_pipeline(str(args.out), args.language, 1, args.out)(wavs)
    else:
        original, exported = (ours(str(model), args.language, 1, args.out)(wavs) for model in (source, args.out))
    normalise = get_normaliser(whisper_normaliser([args.language]))
    texts = [
        [normalise(text, args.language) for text in each] for each in ([r["text"] for r in rows], original, exported)
    ]
    wers = [error_rate_percent(count_errors(texts[0], found)) for found in texts[1:]]
    same = sum(a == b for a, b in zip(texts[1], texts[2], strict=True))
    about = f"{same} of {len(rows)} transcripts are the same; WER {wers[0]:.2f} % here, {wers[1]:.2f} % in {args.to}"
    if wers[1] - wers[0] > MOST_WER_PERCENT or (not args.quantise and same < len(rows)):
        raise UserError(f"the exported model is not as good as {args.model}: {about}. It is in {args.out}")
    return about
