"""Compute Whisper's log-mel features and label ids once, and store them in Parquet shards, on a disk or in an object store.

    python scripts/prepare_features.py WHISPER --manifest my.jsonl --split train --out s3://bucket/features
    python scripts/prepare_features.py WHISPER --corpus common_voice --data_folder cv/sv-SE \\
        --corpus_options "{language: sv-SE, cleaning: none}" --splits train dev --out /data/features --dtype float16
    python recipes/finetune_whisper/train.py hparams/finetune_whisper.yaml --features_url s3://bucket/features ...

--out is a path or any URL that fsspec knows (s3://, gs://, gdrive://, hopsfs://); credentials are read from the environment.
Rerun an interrupted command to resume: complete shards are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from efficient_asr.corpora import prepare_corpus
from efficient_asr.data import Row, load_row, read_manifest
from efficient_asr.data.shards import DTYPES, Place, write_shards
from efficient_asr.models.hub import model_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.command_line import read_value
from efficient_asr.settings.options import at_least
from efficient_asr.text.languages import normalise_language
from efficient_asr.training.whisper import features_meta, fitting_rows
from efficient_asr.utils.errors import UserError, exit_code
from efficient_asr.utils.locks import FolderLock


def parse() -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="WHISPER", help="Whisper whose features and tokens are stored: directory or hub id"
    )
    parser.add_argument("--manifest", type=Path, help="JSON lines: id, audio, duration, text, language")
    parser.add_argument("--split", default="train", help="with --manifest: name of the split (default train)")
    parser.add_argument("--corpus", help="instead of --manifest: module of efficient_asr/corpora, or a dotted path")
    parser.add_argument("--data_folder", help="with --corpus: its folder")
    parser.add_argument("--corpus_options", type=read_value, default={}, help="with --corpus: options, as in YAML")
    parser.add_argument(
        "--prepared_folder", type=Path, default=Path("data/features"), help="with --corpus: for manifests"
    )
    parser.add_argument("--splits", nargs="+", help="with --corpus: the splits to store (default: all)")
    parser.add_argument("--language", help="language of utterances that do not specify one (default en)")
    parser.add_argument("--out", required=True, help="folder: a path or URL")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the features (default float32: as computed)"
    )
    parser.add_argument("--shard_size", type=at_least(1), default=64, help="utterances in a shard (default 64)")
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out utterances that cannot be used, and list them"
    )
    args = parser.parse_args()
    if bool(args.manifest) == bool(args.corpus):
        raise UserError("give either --manifest or --corpus")
    return args


def manifests(args: argparse.Namespace) -> dict[str, Path]:
    """Return the manifest of each split."""
    if args.manifest:
        return {args.split: args.manifest}
    with FolderLock(args.prepared_folder, wait=True):
        found = prepare_corpus(args.corpus, args.data_folder, args.prepared_folder, args.corpus_options)
    unknown = [name for name in args.splits or () if name not in found]
    if unknown:
        raise UserError(f"--splits: the corpus has no split '{unknown[0]}'; it has {', '.join(found)}")
    return {name: path for name, path in found.items() if not args.splits or name in args.splits}


def main() -> None:
    """Run the command."""
    args = parse()
    place = Place(args.out)
    whisper = Whisper.from_source(model_source(args.model), with_padding=False)
    whisper.labels.default_language = normalise_language(args.language) if args.language else "en"
    whisper.labels.check_language(whisper.labels.default_language)

    def compute(row: Row) -> tuple[torch.Tensor, list[int]]:
        wav = load_row(row)
        with torch.no_grad():
            return whisper.features(wav[None], torch.tensor([len(wav)]))[0], whisper.labels.encode_row(row)

    for split, path in manifests(args).items():
        skipped = args.prepared_folder / f"skipped_{split}.jsonl"
        rows = read_manifest(path, skip_bad=args.skip_bad, skipped_file=skipped, refuse_silence=True)
        unfit = args.prepared_folder / f"unfit_{split}.jsonl"
        rows = fitting_rows(whisper, rows, 1.0, args.skip_bad, unfit)
        rows = rows.map(
            lambda row: {"language": whisper.labels.default_language, **row} if whisper.labels.languages else row
        )
        done = write_shards(place, split, rows, features_meta(whisper), compute, args.dtype, args.shard_size)
        print(
            f"{split}: {done['utterances']} utterances in {done['shards']} shards ({done['kept']} were there), "
            f"{done['bytes'] / 1e6:.1f} MB: {place.url}/{split}"
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
