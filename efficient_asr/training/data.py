"""Data of an experiment: prepares the splits, checks all data before training, and loads the language model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from efficient_asr.corpora import prepare_corpus
from efficient_asr.data import Rows, normalise_texts, read_manifest
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.models.sources import resolve_source
from efficient_asr.text.normalise import get_normaliser
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError, check_writable, listing
from efficient_asr.utils.files import atomic_write_text
from efficient_asr.utils.locks import FolderLock

Anything = TypeVar("Anything")
SOURCE_NOTE = "prepared_from.json"  # in a folder of manifests: the data that they were made of


def main_first(work: Callable[[], Anything]) -> Anything:
    """Run `work` on the main process first, then on the others, which reuse the files it has written."""
    if not distributed.if_main_process():
        distributed.ddp_barrier()
    value = work()
    if distributed.if_main_process():
        distributed.ddp_barrier()
    return value


def _folder_for(prepared_folder: Path, hparams: dict[str, Any], data_folder: str | None) -> Path:
    """Return the folder for the manifests: `prepared_folder`, or one beside it if that holds manifests of other data.

    A run reads its manifests until it ends. Another one with the same YAML file and other data must not replace them.
    """
    source = {
        "corpus": hparams["corpus"],
        "data_folder": os.path.abspath(data_folder) if data_folder else None,
        "options": hparams["corpus_options"] or {},
    }
    text, note = json.dumps(source, sort_keys=True, default=str), prepared_folder / SOURCE_NOTE
    if note.is_file() and note.read_text(encoding="utf-8") != text:
        other = prepared_folder.with_name(f"{prepared_folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        print(f"prepared_folder: {prepared_folder} holds manifests of other data; those of this run are in {other}")
        return other
    atomic_write_text(note, text)
    return prepared_folder


def prepare_splits(hparams: dict[str, Any]) -> dict[str, Path]:
    """Prepare the corpus on the main process, under a lock; return the manifest path of each split."""
    data_folder = resolve_source(hparams["data_folder"]) if hparams["data_folder"] else None
    prepared_folder, splits = Path(hparams["prepared_folder"]), None
    if distributed.if_main_process():
        check_writable(prepared_folder, "prepared_folder")
        with FolderLock(prepared_folder, wait=True):
            folder = _folder_for(prepared_folder, hparams, data_folder)
            splits = prepare_corpus(hparams["corpus"], data_folder, folder, hparams["corpus_options"] or {})
    splits = distributed.ddp_broadcast(splits)
    for key in ("train_split", "valid_split", "test_splits"):
        for name in [hparams[key]] if isinstance(hparams[key], str) else hparams[key] or []:
            if name not in splits:
                raise UserError(f"{key}: the corpus has no split '{name}'; it has {', '.join(splits)}")
    return splits


def read_benchmarks(hparams: dict[str, Any], splits: dict[str, Path], output_folder: Path) -> list[Benchmark]:
    """Read and check the test data and make sure that the language model can be loaded, before a long training."""
    names = hparams["test_splits"]
    if not names:
        raise UserError("test_splits: name at least one split to evaluate on")
    if hparams["lm_path"]:
        read_language_model(hparams, ["", " ", "a"], check=False)

    def read(name: str) -> Benchmark:
        return Benchmark.from_manifest(
            splits[name],
            corpus=hparams["corpus_name"] or hparams["corpus"],
            split=name,
            normaliser=hparams["test_normaliser"],
            skip_bad=hparams["skip_bad"],
            skipped_file=output_folder / f"skipped_{name}.jsonl",
            check_audio=hparams["check_audio"],
            cache=output_folder / f"checked_{name}.json",
            language=hparams.get("language"),
            task=hparams.get("task") or "transcribe",
        )

    benchmarks = [main_first(lambda name=name: read(name)) for name in ([names] if isinstance(names, str) else names)]
    if hparams["test_normaliser"] is None:  # for validation
        chosen = {benchmark.normaliser for benchmark in benchmarks}
        hparams["test_normaliser"] = chosen.pop() if len(chosen) == 1 else "multilingual"
    return benchmarks


def read_language_model(hparams: dict[str, Any], vocabulary: list[str], check: bool = True) -> LanguageModel:
    """Load the language model named in the YAML file and check that it matches the labels."""
    return LanguageModel(
        resolve_source(hparams["lm_path"]),
        vocabulary,
        alpha=hparams["lm_alpha"],
        beta=hparams["lm_beta"],
        beam_size=hparams["lm_beam_size"],
        case=hparams["lm_case"],
        check=check,
    )


def read_training_rows(
    hparams: dict[str, Any], manifest: Path, split: str, output_folder: Path, need_text: bool = True
) -> Rows:
    """Read and check training or validation data; skip and report utterances that are too long."""
    skip_bad = hparams["skip_bad"]
    rows = main_first(
        lambda: read_manifest(
            manifest,
            need_text=need_text,
            skip_bad=skip_bad,
            skipped_file=output_folder / f"skipped_{split}.jsonl",
            check_audio=hparams["check_audio"],
            refuse_silence=True,
            cache=output_folder / f"checked_{split}.json",
        )
    )
    if need_text:
        normaliser = get_normaliser(hparams["train_normaliser"])
        rows = normalise_texts(rows, normaliser, skip_bad, output_folder / f"skipped_{split}_empty.jsonl")
    return without_long(rows, split, hparams["max_duration_s"])


def without_long(rows: Rows, split: str, max_duration_s: float | None) -> Rows:
    """Leave out and report utterances that are too long.

    Raises
    ------
    UserError
        If all of them are.
    """
    limit = max_duration_s or float("inf")
    long = (rows.durations > limit).nonzero()[0]
    if len(long) == len(rows):
        raise UserError(f"every utterance in '{split}' is longer than max_duration_s={limit}")
    if len(long):
        names = listing([rows[i]["id"] for i in long[:6]], most=5)
        print(f"{len(long)} utterances in '{split}' are longer than max_duration_s={limit} and were left out:\n{names}")
        rows = rows.select((rows.durations <= limit).nonzero()[0])
    return rows


def language_groups(rows: Rows) -> np.ndarray:
    """Return an integer language id for each utterance, [count]."""
    return np.unique([str(row.get("language")) for row in rows], return_inverse=True)[1]


def digest_of(rows: Rows, language: str | None) -> str:
    """Return the number of utterances and a checksum; `language` is used for utterances that do not specify one."""
    digest = hashlib.sha256()
    for row in rows:
        segment = f"\0{row['offset']}" if "offset" in row else ""
        more = [row["segments"] if row.get("timed") else None, row.get("previous_text")]
        target = f"\0{json.dumps(more)}" if any(more) else ""
        digest.update(
            f"{row['id']}\0{row['duration']}\0{row['text']}\0{row.get('language') or language}{segment}{target}\n".encode()
        )
    return f"{len(rows)}, sum {digest.hexdigest()[:12]}"
