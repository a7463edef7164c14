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
from speechbrain.augment.time_domain import AddNoise, SpeedPerturb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.processing.signal_processing import reverberate

from efficient_asr.errors import UserError, did_you_mean, listing
from efficient_asr.text import CharacterLabels, Normaliser

SAMPLE_RATE = 16000
FIELDS = ("id", "audio", "duration", "text", "language", "speaker")
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
    for key in columns or {}:
        if key not in FIELDS:
            raise UserError(
                f"columns: '{key}' is not a manifest field ({', '.join(FIELDS)}).{did_you_mean(key, FIELDS)}"
            )
    wanted = {field: [field] for field in FIELDS}
    for field, names in (columns or {}).items():
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
    if "broken" in raw:  # found while the corpus was prepared
        raise ValueError(raw["broken"])
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
    return row


def _origin(line: bytes) -> str | None:
    """Where a line of a prepared manifest came from, if the corpus noted it."""
    try:
        return json.loads(line).get("origin")
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


def normalise_texts(rows: list[Row], normaliser: Normaliser) -> list[Row]:
    """Return copies of the rows with normalised text; those whose text becomes empty are left out and counted."""
    out = [{**row, "text": normaliser(row["text"], row.get("language", "en"))} for row in rows]
    kept = [row for row in out if row["text"]]
    if len(kept) < len(out):
        empty = [{"id": row["id"], "problem": "text empty after normalisation"} for row in out if not row["text"]]
        report_skipped("training text", empty, None)
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


class Augment(torch.nn.Module):
    """Speed perturbation, reverberation and additive noise, in this order, on a batch of training waveforms.

    The random choices use torch's global generator only, so that a resumed training repeats them.

    Arguments
    ---------
    speeds_percent : list of int
        One is drawn for each batch; [100] leaves the speed alone.
    rir_manifest, noise_manifest : str or None
        Manifests of room impulse responses and of noises (no text needed).
    snr_low_db, snr_high_db : float
        Range of the signal-to-noise ratio.
    probability : float
        Chance that a batch gets reverberation, and independently noise.
    """

    def __init__(
        self,
        speeds_percent: list[int] | None = None,
        rir_manifest: str | None = None,
        noise_manifest: str | None = None,
        snr_low_db: float = 0.0,
        snr_high_db: float = 20.0,
        probability: float = 0.5,
    ) -> None:
        super().__init__()
        speeds = [100] if speeds_percent is None else list(speeds_percent)
        self.fastest = max(speeds) / 100
        self.speed = SpeedPerturb(SAMPLE_RATE, speeds) if speeds != [100] else None
        self.probability = probability
        self.rirs = read_manifest(Path(rir_manifest), need_text=False) if rir_manifest else []
        self.noises = read_manifest(Path(noise_manifest), need_text=False) if noise_manifest else []
        self.add_noise = AddNoise(snr_low=snr_low_db, snr_high=snr_high_db, normalize=True, noise_funct=self._noise)

    def _noise(self, wavs: torch.Tensor) -> torch.Tensor:
        """Draw a noise for each row, repeated to the length of the batch; shape like `wavs` [batch, time]."""
        out = torch.empty_like(wavs)
        for i in range(len(wavs)):
            noise = load_audio(self.noises[int(torch.randint(len(self.noises), ()))]["audio"]).to(wavs)
            start = int(torch.randint(len(noise), ()))
            repeats = (start + wavs.shape[1]) // len(noise) + 1
            out[i] = noise.repeat(repeats)[start : start + wavs.shape[1]]
        return out

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented `wavs` [batch, time'] and `wav_lens` [batch]; padding stays zero."""
        if self.speed is not None:
            wavs = self.speed(wavs)
        if self.rirs and torch.rand(()) < self.probability:
            rir = load_audio(self.rirs[int(torch.randint(len(self.rirs), ()))]["audio"]).to(wavs)
            wavs = reverberate(wavs, rir.unsqueeze(0), rescale_amp="avg")
        if self.noises and torch.rand(()) < self.probability:
            wavs = self.add_noise(wavs, wav_lens)
        return zero_padding(wavs, absolute_lengths(wavs, wav_lens)), wav_lens


def absolute_lengths(wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
    """Turn relative `wav_lens` [batch] into sample counts [batch] of `wavs` [batch, time]."""
    return (wav_lens.to(torch.float64) * wavs.shape[1]).round().long().clamp(max=wavs.shape[1])


def zero_padding(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Set everything behind `lengths` [batch] to zero in `values` [batch, time, ...]."""
    if bool((lengths == values.shape[1]).all()):
        return values
    mask = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
    return values * mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
