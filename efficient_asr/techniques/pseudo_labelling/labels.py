r"""Pseudo-labels: what a teacher hears, with what is needed to judge it.

Gandhi, von Platen, Rush: "Distil-Whisper: Robust Knowledge Distillation via Large-Scale Pseudo Labelling" (arXiv 2311.00430). The
text of an utterance is replaced by the teacher's transcript :math:`\hat y`. Where the original text :math:`y` is known, the word
error rate between the two, both normalised,

.. math:: \mathrm{WER}(y, \hat y) = \frac{S + D + I}{|y|},

tells whether to trust it (`filtering.py`).

Deviations: audio without texts can be labelled too; it is judged by the mean log-probability of the tokens, the zlib compression
ratio of the text (repetition), and the probability of silence, as in Whisper's own fallback (arXiv 2212.04356, section 4.5).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from efficient_asr.data import ORIGIN, BatchOrder, Row, Rows
from efficient_asr.evaluation.records import PartFiles
from efficient_asr.evaluation.wer import count_errors, error_rate_percent
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.manifest_pass import keep, pass_over, progress_bar, unfinished
from efficient_asr.inference.transcriber import transcribe_rows
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.sources import fingerprint, read_config, resolve_source
from efficient_asr.models.whisper.decoding import DecodingOptions, compression_ratio
from efficient_asr.text.normalise import get_normaliser, join_signs, whisper_normaliser
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, atomic_write_text
from efficient_asr.utils.locks import FolderLock

LOADING = (
    "language", "long_audio", "overlap_s", "long_audio_batch", "encoder_padding", "padding_s", "quantise", "backend", "assistant",
)  # fmt: skip
Batches = Iterator[tuple[list[Row], list[Row]]]


class Labeller:
    """Labels batches of utterances with a teacher.

    Arguments
    ---------
    source : str
        The teacher: anything that `load_transcriber` opens.
    options : dict
        Options of `load_transcriber`.
    device : str
        Device to run it on.
    normaliser : str or None
        Normaliser for WER and CER; None for Whisper's own, by language.
    timestamps : bool
        Whether to keep timed `segments`.
    """

    def __init__(
        self, source: str, options: dict[str, Any], device: str, normaliser: str | None = None, timestamps: bool = False
    ) -> None:
        self.transcriber = load_transcriber(source, **options).to(device)
        self.normaliser, self.timestamps = normaliser, timestamps

    def __call__(self, rows: Sequence[Row], wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Row]:
        """Return the labelled rows of a batch, [batch, time] with relative lengths [batch]."""
        found = transcribe_rows(self.transcriber, list(rows), wavs, wav_lens)
        return [self.label(row, transcript) for row, transcript in zip(rows, found, strict=True)]

    def label(self, row: Row, transcript: Transcript) -> Row:
        """Return a row with the teacher's text; `origin_text`, `wer_percent` and `cer_percent` if it had one."""
        language = row.get("language") or transcript.details.get("language") or self.transcriber.language
        labelled = {key: value for key, value in row.items() if key not in ("text", "origin_text", "segments", ORIGIN)}
        labelled |= {"text": transcript.text} | ({"language": language} if language else {})
        if str(row.get("text") or "").strip():
            labelled |= {"origin_text": row["text"]} | self._rates(row["text"], transcript.text, language)
        labelled |= confidences(transcript)
        if self.timestamps:
            kept = ("start_s", "end_s", "text")
            segments = transcript.details.get("segments", [])
            labelled["segments"] = [{key: segment[key] for key in kept} for segment in segments]
        return labelled

    def _rates(self, text: str, hypothesis: str, language: str | None) -> dict[str, float | None]:
        normalise = get_normaliser(self.normaliser or whisper_normaliser([language or "en"]))
        pair = [normalise(each, language or "en") for each in (text, hypothesis)]
        rates = {}
        for name, characters in (("wer_percent", False), ("cer_percent", True)):
            texts = [join_signs(each) for each in pair] if characters else pair
            rate = error_rate_percent(count_errors([texts[0]], [texts[1]], characters))
            rates[name] = None if rate is None else round(rate, 2)
        return rates


def confidences(transcript: Transcript) -> dict[str, float | None]:
    """Return `avg_logprob`, `compression_ratio` and `no_speech_prob` of a transcript; None where the model has none.

    Of audio that was transcribed in pieces: the mean over the tokens, and the highest probability of silence.
    """
    parts = [transcript.details] if "avg_logprob" in transcript.details else transcript.details.get("segments", [])
    parts = [part for part in parts if "avg_logprob" in part]
    weights = [part.get("tokens", 0) + 1 for part in parts]  # and the end token
    mean = sum(w * part["avg_logprob"] for w, part in zip(weights, parts, strict=True)) / max(1, sum(weights))
    silent = [part["no_speech_prob"] for part in parts if part.get("no_speech_prob") is not None]
    return {
        "avg_logprob": round(mean, 4) if parts and math.isfinite(mean) else None,
        "compression_ratio": round(compression_ratio(transcript.text), 3),
        "no_speech_prob": round(max(silent), 4) if silent else None,
    }


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
        if _is_complete(out, json.loads(json.dumps(key)), len(rows)):
            print(f"{len(rows)} utterances are labelled already")
            return out
        parts = PartFiles(folder / "labels", json.dumps(key, sort_keys=True))
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
    from efficient_asr.techniques.pseudo_labelling.ray_workers import label_batches

    with progress_bar(rows, todo, "labelling with Ray") as progress:
        for chunk, records in label_batches(rows, todo, arguments, hparams["ray_address"], hparams["ray_workers"]):
            keep(chunk, records, done, append)
            progress.update(sum(row["duration"] for row in chunk))
