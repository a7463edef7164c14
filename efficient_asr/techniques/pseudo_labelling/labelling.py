"""The labelling pass: batch by batch, continuing where it stopped, here or on the workers of Ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from efficient_asr.data import ORIGIN, BatchOrder, Rows, check_columns, inspect_audio
from efficient_asr.evaluation.manifest_transcripts import STATE, current_ids, states_now
from efficient_asr.evaluation.records import PartFiles
from efficient_asr.inference.load import whisper_keys
from efficient_asr.inference.manifest_pass import keep, pass_over, progress_bar, unfinished
from efficient_asr.inference.transcriber import MANIFEST
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import local_config
from efficient_asr.models.sources import fingerprint, with_contents
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.techniques.pseudo_labelling.labels import Labeller
from efficient_asr.techniques.pseudo_labelling.ray_workers import label_batches
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, atomic_write_text, differing_entries
from efficient_asr.utils.locks import FolderLock

UNREADABLE = "unreadable.jsonl"


def teacher_options(hparams: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the options of `load_transcriber` in a YAML file that suit a teacher: those that differ from the defaults.

    Whisper's probability of silence is recorded, without any effect on the text unless `no_speech_threshold` is set.
    """
    defaults = DecodingOptions()
    options = {
        name: hparams[name]
        for name in DecodingOptions.__dataclass_fields__
        if name in hparams and hparams[name] != getattr(defaults, name)
    }
    loading = whisper_keys(hparams) | {"language": hparams["language"]}
    options |= {name: value for name, value in loading.items() if value is not None}
    if options.get("assistant") and hparams["batch_size"] > 1:
        raise UserError(
            "assistant: it proposes tokens for one utterance at a time; set batch_size to 1, or leave it out"
        )
    own = local_config(source)
    if own.get("format") != "efficient_asr":
        return {"no_speech_threshold": 1.0} | options
    if options.pop("timestamps", False):
        print(f"timestamps: a model of the kind {own.get('kind')} predicts none; the labels have no segments")
    if options.get("language") == MANIFEST and not str(own.get("kind")).startswith("ctc"):
        del options["language"]  # a cascade detects it
    return options


def write_labels(
    rows: Rows, hparams: dict[str, Any], folder: Path, device: str | None, on_start: Callable[[], Any] | None = None
) -> Path:
    """Label all utterances and write `<folder>/labels.jsonl`, in the order of `rows`; a rerun continues.

    With `skip_bad`, utterances whose audio cannot be read are listed in `<folder>/unreadable.jsonl` instead.

    Arguments
    ---------
    rows : Rows
        The utterances.
    hparams : dict
        Values of the YAML file.
    folder : Path
        Folder for the output.
    device : str or None
        Device for the teacher; None for the GPUs of a Ray cluster, if it has any.
    on_start : callable, optional
        Called when it is known that the folder belongs to these settings.

    Raises
    ------
    UserError
        If the folder has labels of another teacher, other settings or other utterances, or an utterance has a wrong text or a
        language that the teacher does not know.
    """
    source = model_source(hparams["teacher_model"])
    options = teacher_options(hparams, source)
    columns = [name for name in check_columns(hparams.get("columns"))["text"] if name != "text"]
    more = {"normaliser": hparams["normaliser"], "timestamps": hparams["timestamps"], "text_columns": columns}
    key = {
        "teacher_model": fingerprint(source), "options": options, **more,
        "batches": [hparams["batch_size"], hparams["max_batch_length_s"]], "manifest": digest(rows),
    }  # fmt: skip
    out = folder / "labels.jsonl"
    with FolderLock(folder):
        bad = _still_unreadable(out.with_name(UNREADABLE), rows)
        complete = _is_complete(out, json.loads(json.dumps(key)), len(rows) - len(bad))
        if on_start is not None:
            on_start()
        content = {"options": with_contents(options)}  # what an interrupted run depends on too
        parts = PartFiles(folder / "labels", json.dumps(key | content, sort_keys=True, default=str))
        if complete:
            print(f"{len(rows)} utterances are labelled already")
            parts.discard()  # killed just before that
            return out
        order = BatchOrder(
            rows.durations, "descending", hparams["batch_size"], hparams["max_batch_length_s"], repeat=False
        )
        current = current_ids(parts, rows)
        states = states_now(rows, current)
        with parts.open() as file:
            done = current | _adopt(out, rows, bad, current, _noting(file.append, states))
        todo = unfinished(rows, order, done)
        if done:
            print(f"{len(done)} of {len(rows)} utterances are labelled already")
        places = {key: _anywhere(options[key]) for key in ("assistant", "quantise") if key in options}
        arguments = {"source": _anywhere(source), "options": options | places, "device": device, **more}
        with parts.open() as file:
            if hparams["ray_workers"] or hparams["ray_address"]:
                _check_languages(rows, arguments)
                _label_with_ray(rows, todo, done, arguments, hparams, _noting(file.append, states))
            else:
                label = Labeller(**arguments)
                label.transcriber.check_rows(rows, "manifest")
                pass_over(rows, todo, done, label, _noting(file.append, states), "labelling", hparams["skip_bad"])
        _write(parts.merge(row["id"] for row in rows), out)
        parts.discard()
    return out


def _noting(
    append: Callable[[dict[str, Any]], None], states: dict[str, str | None]
) -> Callable[[dict[str, Any]], None]:
    """Return `append` for records that note the state of their audio, so that a rerun labels changed audio again."""

    def note(record: dict[str, Any]) -> None:
        append(record | ({STATE: states[record["id"]]} if "text" in record else {}))

    return note


def _still_unreadable(path: Path, rows: Rows) -> set[str]:
    """Return the ids of utterances that could not be read and cannot be read now either."""
    if not path.is_file():
        return set()
    listed = {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()}
    found = [row for row in rows if row["id"] in listed]
    return {
        row["id"]
        for row in found
        if inspect_audio(row["audio"], True, row.get("offset"), row["duration"]).problem is not None
    }


def _adopt(
    out: Path, rows: Rows, bad: set[str], done: Container[str], append: Callable[[dict[str, Any]], None]
) -> set[str]:
    """Keep the labels of an output from which lines were deleted; return the ids of those that were not in `done`.

    Of the utterances that could not be read, those that cannot be read now either (`bad`) are kept.
    """
    kept: set[str] = set()
    if not out.is_file():
        return kept
    wanted = {row["id"] for row in rows if row["id"] not in done}
    for path in (out, out.with_name(UNREADABLE)):
        for line in open(path, encoding="utf-8") if path.is_file() else ():
            record = json.loads(line)
            if record["id"] in wanted - kept and ("text" in record or record["id"] in bad):
                kept.add(record["id"])
                append(record)
    return kept


def _write(records: Iterable[dict[str, Any]], out: Path) -> None:
    """Write the labels, and beside them the utterances that could not be read."""
    unreadable = 0
    with atomic_write(out.with_name(UNREADABLE)) as bad_path, atomic_write(out) as out_path:
        with open(bad_path, "w", encoding="utf-8") as bad, open(out_path, "w", encoding="utf-8") as good:
            for record in records:
                is_label = "text" in record
                record.pop(STATE, None)
                unreadable += not is_label
                (good if is_label else bad).write(json.dumps(record, ensure_ascii=False) + "\n")
    if unreadable:
        print(f"{unreadable} utterances could not be read: {out.with_name(UNREADABLE)}")
    else:
        out.with_name(UNREADABLE).unlink()


def _anywhere(value: Any) -> Any:
    """Return the absolute path of a file or folder, for workers with another working directory; anything else as it is."""
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def _check_languages(rows: Rows, arguments: dict[str, Any]) -> None:
    """Check the languages of the manifest here, if it has any; the workers would find a wrong one late.

    Raises
    ------
    UserError
        Naming the first utterance whose language the teacher does not know.
    """
    if arguments["options"].get("language") == MANIFEST and any(row.get("language") for row in rows):
        Labeller(**arguments | {"device": "cpu"}).transcriber.check_rows(rows, "manifest")


def digest(rows: Rows) -> str:
    """Return a checksum of the manifest: of every field of every utterance.

    Raises
    ------
    UserError
        If a text is no string.
    """
    found = hashlib.sha256()
    for row in rows:
        if not isinstance(row.get("text", ""), (str, type(None))):
            raise UserError(f"utterance '{row['id']}': text {row['text']!r} is not a string; fix the manifest")
        found.update(json.dumps({key: value for key, value in row.items() if key != ORIGIN}, sort_keys=True).encode())
    return found.hexdigest()[:16]


def _is_complete(out: Path, key: dict[str, Any], count: int) -> bool:
    """Record the key beside the output; return whether the output is complete.

    Raises
    ------
    UserError
        If the folder belongs to another key.
    """
    about = out.with_suffix(".meta.json")
    if out.is_file() and not about.is_file():
        raise UserError(f"output_folder: {out} was not written by this command; use another folder")
    different = differing_entries(about, key) if about.is_file() else []
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
        found = label_batches(
            rows, todo, arguments, hparams["ray_address"], hparams["ray_workers"], hparams["skip_bad"]
        )
        for chunk, records in found:
            keep(chunk, records, done, append)
            progress.update(sum(row["duration"] for row in chunk))
