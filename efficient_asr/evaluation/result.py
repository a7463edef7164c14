"""Result: one JSON file with the cost and accuracy of a Transcriber, and the provenance of the numbers."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from efficient_asr.evaluation.records import Records
from efficient_asr.evaluation.runtime import CACHE_VARIABLE
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, atomic_write_text

PACKAGES = (
    "torch",
    "torchaudio",
    "transformers",
    "speechbrain",
    "jiwer",
    "kenlm",
    "thop",
    "onnxruntime",
    "ctranslate2",
)


@dataclass
class Result:
    """What a transcriber costs on a benchmark, how well it does, and where the numbers come from; None where nothing was
    measured.

    Attributes
    ----------
    experiment : str
        Name of the experiment, and of the file.
    recipe : str or None
        Recipe that trained the model.
    technique : str
        Techniques in the model, joined by ` + `; `none` for a baseline.
    variant : str
        Row of the tables: what the techniques call their settings.
    corpus, split : str
        Names of the data.
    benchmark_hash : str
        Changes with any utterance, reference or duration, and with the normaliser; tables never mix two.
    utterances : int
        Number of utterances.
    audio_s : float
        Seconds of audio.
    reference_words : int
        Words of the normalised references.
    wer_percent : float or None
        Pooled word error rate.
    wer_ci95_percent : list of two floats, or None
        95 % interval of the WER, by bootstrap over utterances.
    cer_percent : float or None
        Pooled character error rate, without the spaces between characters of scripts without spaces.
    substitutions, deletions, insertions : int
        Word errors.
    wer_lm_percent : float or None
        WER with a language model.
    parameters : int or None
        Weights of the model, all models of a cascade together.
    macs_g : float or None
        Billions of multiply-accumulates of everything that ran, mean of an utterance.
    macs_g_per_audio_s : float or None
        The same for each second of audio.
    macs_thop_g : float or None
        Mean of an utterance in the papers' convention, by the rules of thop.
    runtimes : list of dict
        One entry for each device, batch size, and with and without a language model.
    runtimes.device, runtimes.device_name : str
        `cpu` or `cuda`, and the name of the hardware.
    runtimes.threads : int
        CPU threads of torch.
    runtimes.batch_size : int
        Utterances in a batch.
    runtimes.lm : bool
        Whether a language model was used.
    runtimes.runtime_s, runtimes.runtime_min_s, runtimes.runtime_max_s : float
        Median, shortest and longest time of a run over the split.
    runtimes.repeats : int
        Timed runs.
    runtimes.rtfx : float
        Seconds of audio for each second of computing.
    runtimes.peak_memory_bytes : int or None
        High-water mark of the process's resident memory, or of the GPU's allocator.
    details : dict
        What the techniques, languages and translations add.
    hparams : dict
        Settings in force: the keys of the YAML file, or the options of the script.
    provenance : dict
        Commit, date, versions, seed, hardware, a checksum of the transcriber's settings, and the limit of oneDNN's cache.
    synthetic : bool
        Whether all utterances are synthetic speech.
    normaliser : str
        Normaliser of references and hypotheses.
    lm : dict or None
        Settings of the language model.
    rows : Records
        The utterances, in a file of their own.
    path : Path or None
        File that the Result was read from or written to.
    """

    experiment: str
    recipe: str | None
    technique: str
    variant: str
    corpus: str
    split: str
    benchmark_hash: str
    utterances: int
    audio_s: float
    reference_words: int
    wer_percent: float | None
    wer_ci95_percent: tuple[float, float] | None
    cer_percent: float | None
    substitutions: int
    deletions: int
    insertions: int
    wer_lm_percent: float | None
    parameters: int | None
    macs_g: float | None
    macs_g_per_audio_s: float | None
    macs_thop_g: float | None
    runtimes: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    synthetic: bool = False
    normaliser: str = "plain"
    lm: dict[str, Any] | None = None
    rows: Records = field(default_factory=Records, repr=False)
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del data["rows"], data["path"]
        return data

    def save(self, target: Path) -> Path:
        """Write `<experiment>.json` into a folder (or to a path that ends in .json) and the utterances next to it."""
        target = Path(target)
        path = target if target.suffix == ".json" else target / f"{self.experiment}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        utterances = path.with_suffix(".utterances.jsonl")
        with atomic_write(utterances, shared=True) as partial:
            self.rows.write(partial)
        self.path = path
        self.save_fields()
        return path

    def save_fields(self) -> None:
        """Write the file again, without the utterances."""
        atomic_write_text(self.path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result.

        Raises
        ------
        UserError
            If the file is not a Result, naming the missing keys.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as a result ({error})") from None
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = [
            n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [key for key in required if not isinstance(data, dict) or key not in data]
        if missing:
            raise UserError(f"{path} is not a result: {', '.join(missing)} missing")
        return cls(**{key: value for key, value in data.items() if key in known}, path=Path(path))

    @property
    def model_name(self) -> str | None:
        """Name of the model that was trained or evaluated: the last part of its path or hub id; None if it is not recorded."""
        for key in ("source", "model"):
            source = self.hparams.get(key)
            if isinstance(source, str) and source not in ("None", ""):
                parts = [part for part in source.rstrip("/").split("/") if part]
                # A model folder of a recipe is output/<experiment>/<seed>/model.
                while len(parts) > 1 and (parts[-1] == "model" or parts[-1].isdigit()):
                    parts.pop()
                return parts[-1].removeprefix("efficient_asr:")
        return None

    def load_utterances(self) -> list[dict[str, Any]]:
        """Read the utterances file next to the result."""
        path = self.path.with_suffix(".utterances.jsonl")
        if not path.is_file():
            raise UserError(f"the utterances of {self.path} are missing: no file at {path}")
        try:
            return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); rerun the evaluation") from None

    def runtime(self, device: str, batch_size: int | None = 1, lm: bool = False) -> dict[str, Any] | None:
        """Return the runtime measured under these conditions (`batch_size` None: the largest batch), or None."""
        fitting = [r for r in self.runtimes if r["device"] == device and r["lm"] == lm]
        if batch_size is not None:
            fitting = [r for r in fitting if r["batch_size"] == batch_size]
        return max(fitting, key=lambda r: r["batch_size"], default=None)

    def summary(self) -> str:
        """Return a one-line summary of the measurements for the terminal."""
        cpu, gpu = self.runtime("cpu"), self.runtime("cuda")
        measured = [
            "WER undefined (no words in the references)"
            if self.wer_percent is None
            else f"WER {self.wer_percent:.2f} % (normaliser {self.normaliser})",
            f"with LM {self.wer_lm_percent:.2f} %" if self.wer_lm_percent is not None else "",
            f"{self.macs_g:.3f} GMACs per utterance" if self.macs_g is not None else "",
            f"CPU {cpu['runtime_s']:.2f} s" if cpu else "",
            f"GPU {gpu['runtime_s']:.2f} s" if gpu else "",
        ]
        found = ", ".join(filter(None, measured))
        return f"{self.experiment} on {self.corpus}/{self.split}: {found} for {self.audio_s:.0f} s of audio"


def digest_of_settings(settings: dict[str, Any]) -> str:
    """Return a checksum of `Transcriber.settings`: network, decoding, thresholds."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def provenance(seed: int | None, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return commit, date, package versions, seed, hardware, and a checksum of the transcriber's settings."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    clock_mhz = None
    if torch.cuda.is_available():
        try:
            clock_mhz = torch.cuda.clock_rate()
        except (ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py, from the extra [gpu]
            pass
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    commit = git.stdout.strip() or None
    return {
        "commit": commit + ("-dirty" if commit and dirty.stdout.strip() else "") if commit else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "seed": seed,
        "settings": None if settings is None else digest_of_settings(settings),
        "onednn_cache_capacity": os.environ.get(CACHE_VARIABLE),
        "hardware": {
            "machine": platform.machine(),
            "cpu_count": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpu_clock_mhz": clock_mhz,
        },
    }
