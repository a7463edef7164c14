"""Manifests, audio, datasets and batches: the only place where data comes in.

A manifest is a file of JSON lines, one utterance each: `id`, `audio` (absolute, or relative to the manifest), `duration`
in seconds, `text`, and optionally `language`, `speaker` and anything else, which is kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile
import torch
import torchaudio.functional
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler

from efficient_asr.errors import UserError, did_you_mean, listing
from efficient_asr.text import CharacterLabels, Normaliser

SAMPLE_RATE = 16000
FIELDS = ("id", "audio", "duration", "text", "language", "speaker")
ORIGIN, BROKEN = "_efficient_asr_origin", "_efficient_asr_broken"  # where a row of a prepared manifest came from
Row = dict[str, Any]


# ---------------------------------------------------------------- manifests


def write_manifest(path: Path, rows: list[Row]) -> Path:
    """Write rows as JSON lines; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def check_columns(columns: dict[str, Any] | None) -> dict[str, list[str]]:
    """Return a full column mapping: manifest field -> names to look for, the first present one counts.

    Raises
    ------
    UserError
        Where a key is not a manifest field.
    """
    if columns is not None and not isinstance(columns, dict):
        raise UserError(f"columns must map manifest fields to column names, not {columns!r}")
    for key in columns or {}:
        if key not in FIELDS:
            raise UserError(
                f"columns: '{key}' is not a manifest field ({', '.join(FIELDS)}).{did_you_mean(key, FIELDS)}"
            )
    wanted = {field: [field] for field in FIELDS}
    for field, names in (columns or {}).items():
        if not isinstance(names, (str, list)) or not all(isinstance(name, str) for name in names):
            raise UserError(f"columns: {field} must be a column name or a list of them, not {names!r}")
        wanted[field] = [names] if isinstance(names, str) else list(names)
    return wanted


def _read_row(line: str, folder: Path, columns: dict[str, list[str]], need_text: bool) -> Row:
    """Parse and check one line; raises ValueError with what is wrong with it."""
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if BROKEN in raw:  # found while the corpus was prepared
        raise ValueError(raw[BROKEN])
    row = dict(raw)
    for field, names in columns.items():
        value = next((raw[name] for name in names if raw.get(name) is not None), None)
        row.pop(field, None)
        if value is not None:
            row[field] = value
    if "audio" not in row:
        raise ValueError(f"no audio: there is no column {' or '.join(map(repr, columns['audio']))} in it")
    audio = folder / str(row["audio"])
    row["id"] = str(row.get("id", row["audio"]))
    row["audio"] = str(audio)
    if need_text and not isinstance(row.get("text"), str):
        raise ValueError(f"no text: there is no column {' or '.join(map(repr, columns['text']))} in it")
    if need_text and not row["text"].strip():
        raise ValueError("empty text")
    if not audio.is_file():
        raise ValueError(f"no such file: {audio}")
    try:
        info = soundfile.info(str(audio))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"cannot decode {audio} ({str(error).strip()})") from None
    if info.frames == 0:
        raise ValueError(f"no samples in {audio}")
    if "duration" not in row:
        row["duration"] = info.frames / info.samplerate
    elif not isinstance(row["duration"], (int, float)) or not 0 < row["duration"] < math.inf:
        raise ValueError(f"duration {row['duration']!r} is not a positive number of seconds")
    seconds = info.frames / info.samplerate
    if abs(row["duration"] - seconds) > max(0.1, 0.01 * seconds):
        raise ValueError(f"duration {row['duration']} s, but {audio} holds {seconds:.3f} s")
    if not isinstance(row.get("language", ""), str):
        raise ValueError(f"language {row['language']!r} is not a text")
    return row


def _origin(line: bytes) -> str | None:
    """Where a line of a prepared manifest came from, if the corpus noted it."""
    try:
        return json.loads(line).get(ORIGIN)
    except (ValueError, AttributeError):
        return None


def read_manifest(
    path: Path,
    columns: dict[str, Any] | None = None,
    need_text: bool = True,
    skip_bad: bool = False,
    skipped_file: Path | None = None,
) -> list[Row]:
    """Read and check a manifest.

    Arguments
    ---------
    path : Path
        JSON lines.
    columns : dict, optional
        Manifest field -> column name, or a list of names of which the first present one counts.
    need_text : bool
        Whether an utterance without text is a mistake.
    skip_bad : bool
        Leave bad lines out instead of stopping.
    skipped_file : Path, optional
        Where `skip_bad` writes what it left out and why, as JSON lines.

    Returns
    -------
    list of dict
        The utterances, `audio` as an absolute path.

    Raises
    ------
    UserError
        Where the file is missing, holds no utterance, or has bad lines and `skip_bad` is False; all are listed.
    """
    path = Path(path)
    mapping = check_columns(columns)
    if not path.is_file():
        raise UserError(f"no manifest at {path}")
    rows: list[Row] = []
    bad: list[dict[str, Any]] = []
    first_line: dict[str, int] = {}
    folder = path.absolute().parent
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            problem = None
            try:
                row = _read_row(data.decode("utf-8"), folder, mapping, need_text)
                if row["id"] in first_line:
                    raise ValueError(f"id '{row['id']}' was already used in line {first_line[row['id']]}")
            except UnicodeDecodeError:
                problem = "not UTF-8"
            except ValueError as error:
                problem = str(error)
            if problem is None:
                first_line[row["id"]] = number
                rows.append(row)
            else:
                bad.append({"line": number, "origin": _origin(data), "problem": problem})
    if bad and not skip_bad:
        shown = listing([f"{b['origin'] or 'line ' + str(b['line'])}: {b['problem']}" for b in bad])
        raise UserError(
            f"{len(bad)} bad line{'s' * (len(bad) > 1)} in {path}:\n{shown}\n"
            "Mend them, or leave them out with --skip_bad True."
        )
    if bad:
        report_skipped(path.name, bad, skipped_file)
    if not rows:
        raise UserError(f"{path} holds no usable utterance")
    return rows


def report_skipped(what: str, bad: list[dict[str, Any]], skipped_file: Path | None) -> None:
    """Say how many utterances were left out, and write them to a file where one is named."""
    where = ""
    if skipped_file is not None:
        write_manifest(skipped_file, bad)
        where = f"; listed in {skipped_file}"
    print(f"{what}: {len(bad)} bad utterance{'s' * (len(bad) > 1)} left out{where}")


# ---------------------------------------------------------------- audio


def load_audio(path: str | Path) -> torch.Tensor:
    """Read any file that libsndfile knows as mono [time] at 16 kHz.

    Raises
    ------
    UserError
        Where the file is missing or cannot be decoded.
    """
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {str(error).strip()}") from None
    wav = torch.from_numpy(samples).mean(dim=1)
    if rate != SAMPLE_RATE:
        wav = torchaudio.functional.resample(wav, rate, SAMPLE_RATE)
    return wav


def pad_wavs(wavs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad waveforms with zeros to `wavs` [batch, time] and relative `wav_lens` [batch]."""
    lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    return batch, lengths / batch.shape[1]


def iterate_batches(rows: list[Row], batch_size: int) -> Iterator[tuple[list[Row], torch.Tensor, torch.Tensor]]:
    """Load utterances in order, `batch_size` at a time; yields rows, wavs [batch, time], wav_lens [batch]."""
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        yield chunk, *pad_wavs([load_audio(row["audio"]) for row in chunk])


# ---------------------------------------------------------------- training


def normalise_texts(
    rows: list[Row], normaliser: Normaliser, skip_bad: bool = False, skipped_file: Path | None = None
) -> list[Row]:
    """Return copies of the rows with normalised text.

    Raises
    ------
    UserError
        Naming the utterances whose text becomes empty, unless `skip_bad` leaves them out.
    """
    out = [{**row, "text": normaliser(row["text"], row.get("language", "en"))} for row in rows]
    kept = [row for row in out if row["text"]]
    if len(kept) < len(out):
        empty = [
            {"id": new["id"], "problem": f"nothing is left of the text {old['text']!r} after normalisation"}
            for old, new in zip(rows, out, strict=True)
            if not new["text"]
        ]
        if not skip_bad:
            shown = listing([f"{b['id']}: {b['problem']}" for b in empty])
            raise UserError(
                f"{len(empty)} texts are empty:\n{shown}\nMend them, or leave them out with --skip_bad True."
            )
        report_skipped("texts", empty, skipped_file)
    return kept


def make_dataset(rows: list[Row], labels: CharacterLabels, sorting: str) -> DynamicItemDataset:
    """Make a SpeechBrain dataset with items `id`, `wav` [time], `tokens` [labels], `text`.

    Arguments
    ---------
    rows : list of dict
        Utterances with normalised text.
    labels : CharacterLabels
        Turns text into `tokens`.
    sorting : str
        `ascending` or `descending` by duration, or `random`.

    Raises
    ------
    UserError
        For any other `sorting`.
    """
    if sorting not in ("ascending", "descending", "random"):
        raise UserError(f"sorting: '{sorting}' is not ascending, descending or random")
    if sorting != "random":
        rows = sorted(rows, key=lambda row: row["duration"], reverse=sorting == "descending")
    keys = ("audio", "duration", "text")
    dataset = DynamicItemDataset({row["id"]: {key: row[key] for key in keys} for row in rows})
    dataset.add_dynamic_item(load_audio, takes="audio", provides="wav")
    dataset.add_dynamic_item(lambda text: torch.tensor(labels.encode(text)), takes="text", provides="tokens")
    dataset.set_output_keys(["id", "wav", "tokens", "text"])
    return dataset


def loader_options(
    dataset: DynamicItemDataset,
    sorting: str,
    batch_size: int,
    max_batch_length_s: float | None,
    num_workers: int,
    seed: int,
) -> dict[str, Any]:
    """Return the arguments of `Brain.make_dataloader`: a fixed batch size, or dynamic batches by duration.

    Arguments
    ---------
    dataset : DynamicItemDataset
        As `make_dataset` returns it.
    sorting : str
        `random` shuffles every epoch; the other orders are kept.
    batch_size : int
        Utterances a batch, where `max_batch_length_s` is None; otherwise the most that a batch may hold.
    max_batch_length_s : float or None
        Audio seconds a batch may hold in all.
    num_workers : int
        Processes that load data.
    seed : int
        Seed of the order.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": PaddedBatch}
    if max_batch_length_s is None:
        return options | {"batch_size": batch_size, "shuffle": sorting == "random"}
    order = "random" if sorting == "random" else sorting
    sampler = DynamicBatchSampler(
        dataset, max_batch_length_s, num_buckets=max(2, min(60, len(dataset) // (2 * batch_size))),
        length_func=lambda row: row["duration"], shuffle=sorting == "random", batch_ordering=order,
        max_batch_ex=batch_size, seed=seed,
    )  # fmt: skip
    return options | {"batch_sampler": sampler}


def absolute_lengths(wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
    """Turn relative `wav_lens` [batch] into sample counts [batch] of `wavs` [batch, time]."""
    return (wav_lens.to(torch.float64) * wavs.shape[1]).round().long().clamp(max=wavs.shape[1])


def zero_padding(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Set everything behind `lengths` [batch] to zero in `values` [batch, time, ...]."""
    if bool((lengths == values.shape[1]).all()):
        return values
    mask = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
    return values * mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
