"""The labelling pass: batch by batch, continuing where it stopped, here or on the workers of Ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficient_asr.data import BatchOrder, Rows
from efficient_asr.evaluation.records import PartFiles
from efficient_asr.inference.manifest_pass import keep, pass_over, progress_bar, unfinished
from efficient_asr.models.sources import fingerprint, read_config, resolve_source
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.techniques.pseudo_labelling.labels import Labeller
from efficient_asr.techniques.pseudo_labelling.ray_workers import label_batches
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, atomic_write_text
from efficient_asr.utils.locks import FolderLock

LOADING = (
    "language", "long_audio", "overlap_s", "long_audio_batch", "encoder_padding", "padding_s", "quantise", "backend", "assistant",
)  # fmt: skip


def teacher_options(hparams: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the options of `load_transcriber` in a YAML file: those that differ from the defaults, which suit any model.

    Whisper's probability of silence is recorded, without any effect on the text unless `no_speech_threshold` is set.
    """
    defaults = DecodingOptions()
    options = {
        name: hparams[name]
        for name in DecodingOptions.__dataclass_fields__
        if name in hparams and hparams[name] != getattr(defaults, name)
    }
    options |= {name: hparams[name] for name in LOADING if hparams.get(name) is not None}
    is_own = os.path.isdir(source) and read_config(source).get("format") == "efficient_asr"
    return options if is_own else {"no_speech_threshold": 1.0} | options


def write_labels(rows: Rows, hparams: dict[str, Any], folder: Path, device: str) -> Path:
    """Label all utterances and write `<folder>/labels.jsonl`, in the order of `rows`; a rerun continues.

    Raises
    ------
    UserError
        If the folder has labels of another teacher, other settings or other utterances.
    """
    source = resolve_source(hparams["teacher_model"])
    options = teacher_options(hparams, source)
    more = {"normaliser": hparams["normaliser"], "timestamps": hparams["timestamps"]}
    key = {
        "teacher_model": fingerprint(source), "options": options, **more,
        "batches": [hparams["batch_size"], hparams["max_batch_length_s"]], "manifest": digest(rows),
    }  # fmt: skip
    out = folder / "labels.jsonl"
    with FolderLock(folder):
        complete = _is_complete(out, json.loads(json.dumps(key)), len(rows))
        parts = PartFiles(folder / "labels", json.dumps(key, sort_keys=True))
        if complete:
            print(f"{len(rows)} utterances are labelled already")
            parts.discard()  # killed just before that
            return out
        order = BatchOrder(
            rows.durations, "descending", hparams["batch_size"], hparams["max_batch_length_s"], repeat=False
        )
        todo = unfinished(rows, order, parts.places)
        if parts.places:
            print(f"{len(parts.places)} of {len(rows)} utterances are labelled already")
        arguments = {"source": source, "options": options, "device": device, **more}
        with parts.open() as file:
            done = {*parts.places}
            if hparams["ray_workers"] or hparams["ray_address"]:
                _label_with_ray(rows, todo, done, arguments, hparams, file.append)
            else:
                pass_over(rows, todo, done, Labeller(**arguments), file.append, "labelling")
        records = parts.merge(row["id"] for row in rows)
        with atomic_write(out) as partial:
            records.write(partial)
        parts.discard()
    return out


def digest(rows: Rows) -> str:
    """Return a checksum of what labels depend on in the manifest: audio, times, texts and languages."""
    found = hashlib.sha256()
    for row in rows:
        about = [row.get(name) for name in ("id", "audio", "offset", "duration", "text", "language")]
        found.update(json.dumps(about).encode())
    return found.hexdigest()[:16]


def _is_complete(out: Path, key: dict[str, Any], count: int) -> bool:
    """Record the key beside the output; return whether the output is complete.

    Raises
    ------
    UserError
        If the folder belongs to another key.
    """
    about = out.with_suffix(".meta.json")
    found = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else key
    different = [name for name in key if found.get(name) != key[name]]
    if different:
        raise UserError(
            f"output_folder: {out.parent} has labels made with a different {', '.join(different)}; use another folder or "
            "delete this one"
        )
    atomic_write_text(about, json.dumps(key, indent=1) + "\n")
    if not out.is_file():
        return False
    with open(out, "rb") as file:
        return sum(1 for _ in file) == count


def _label_with_ray(
    rows: Rows,
    todo: list[list[int]],
    done: set[str],
    arguments: dict[str, Any],
    hparams: dict[str, Any],
    append: Callable[[dict[str, Any]], None],
) -> None:
    """Label batches with workers of Ray; this process keeps the records."""
    with progress_bar(rows, todo, "labelling with Ray") as progress:
        for chunk, records in label_batches(rows, todo, arguments, hparams["ray_address"], hparams["ray_workers"]):
            keep(chunk, records, done, append)
            progress.update(sum(row["duration"] for row in chunk))
