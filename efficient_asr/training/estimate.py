"""How long a training takes and how much memory it needs, from a few batches that are timed on this machine.

    python recipes/<exp>/train.py hparams/<exp>.yaml --estimate [FILE.json]
    ESTIMATE=1 bash scripts/reproduce_downsampling.sh /corpora/LibriSpeech     # the trainings of a table, and their sum

The batches of the first epoch are sorted by seconds of audio and padding, and cut into four parts; the batch in the middle of
each is timed. The mean of these, times the number of batches, is the time of an epoch. The longest batch runs before them, to
warm up, and again after them, when the optimiser has its state: its memory is the peak. Validation is timed in the same way,
and testing on one utterance of each part, on every device that the run measures.

What differs from the run itself: texts that a model writes before it has learned anything may be longer or shorter, so that
validation and testing of Whispers are guesses; the disk may be slower than its cache; other work on the machine counts. Writing
checkpoints, decoding with a language model, and the memory of data loading processes are not counted. With
`grad_accumulation_factor`, the optimiser's step is counted too often or too rarely.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.epoch_loop import EpochCounter

from efficient_asr.data import BatchOrder, Rows, iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.runtime import peak_memory_bytes
from efficient_asr.inference.transcriber import transcribe_rows
from efficient_asr.training.brain import RecipeBrain
from efficient_asr.utils.devices import clock, devices_to_time
from efficient_asr.utils.files import atomic_write_text, folder_bytes

PARTS = 4  # parts of equal size that the batches of an epoch are cut into
FORMAT = "efficient_asr estimate 1"


class SampledOrder(BatchOrder):
    """Given batches of some utterances, the same in every epoch.

    Arguments
    ---------
    durations : numpy.ndarray
        Durations in seconds, [count].
    batches : list of numpy.ndarray
        Indices of utterances.
    """

    def __init__(self, durations: np.ndarray, batches: list[np.ndarray]) -> None:
        self.durations, self.batches, self.skip = durations, batches, 0

    def set_epoch(self, epoch: int) -> None:
        """Keep the batches."""


class Place:
    """A temporary folder beside the output folder of a run; all that was created for it is removed at the end.

    Arguments
    ---------
    output_folder : Path
        Output folder of the run; it need not exist.
    """

    def __init__(self, output_folder: Path) -> None:
        self._created = [folder for folder in (output_folder, *output_folder.parents) if not folder.exists()]
        output_folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{output_folder.name}-estimate-", dir=output_folder.parent))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._created:  # the deepest first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def middles(sizes: np.ndarray) -> list[int]:
    """Return the indices of the middles of `PARTS` parts of equal count, by size, between twice that of the greatest size."""
    order = np.argsort(sizes, kind="stable")
    longest, parts = int(order[-1]), np.array_split(order, min(PARTS, len(order)))
    return [longest, *(int(part[len(part) // 2]) for part in parts), longest]


def mean(times: list[float]) -> float:
    """Return the mean of the times of `middles`: the first one is a warm-up, the last one is there for its memory."""
    return float(np.mean(times[1:-1] or times))


def sampled(rows: Rows, order: BatchOrder) -> tuple[Rows, list[list[str]]]:
    """Return the utterances of the batches to time, and the ids of each batch."""
    order.set_epoch(1)
    sizes = np.array([len(batch) * order.durations[batch].max() for batch in order.batches])
    batches = [order.batches[i] for i in middles(sizes)]
    few = rows.select(np.unique(np.concatenate(batches)))
    return few, [[rows[int(i)]["id"] for i in batch] for batch in batches]


def order_of(rows: Rows, batches: list[list[str]]) -> SampledOrder:
    """Return an order of batches given as ids; utterances that are not in `rows` any more are left out."""
    place = {row["id"]: i for i, row in enumerate(rows)}
    kept = [np.array([place[name] for name in batch if name in place], dtype=np.int64) for batch in batches]
    return SampledOrder(rows.durations, [batch for batch in kept if len(batch)])


def clocked(brain_class: type[RecipeBrain]) -> type[RecipeBrain]:
    """Return a Brain that notes how long batches of training and validation take, and how long it waits for them."""

    class Clocked(brain_class):  # type: ignore[misc, valid-type]
        """The same Brain with clocks: seconds in `times`, and `preparation_s` until the first batch."""

        times: dict[str, list[float]]
        preparation_s: float

        def train(self, *loaders: Any) -> None:
            """Train, and note the time."""
            self.times = {"fit": [], "fit_wait": [], "valid": [], "valid_wait": []}
            self._started = clock()
            super().train(*loaders)

        def on_fit_start(self) -> None:
            """Note how long the preparation took."""
            super().on_fit_start()
            self.preparation_s = clock() - self._started

        def on_stage_start(self, stage: Any, epoch: int | None = None) -> None:
            """Begin to wait for the first batch."""
            super().on_stage_start(stage, epoch)
            self._ready = clock()

        def fit_batch(self, batch: Any) -> torch.Tensor:
            """Process a batch, and note the time."""
            return self._timed("fit", super().fit_batch, batch)

        def evaluate_batch(self, batch: Any, stage: Any) -> torch.Tensor:
            """Validate a batch, and note the time."""
            return self._timed("valid", super().evaluate_batch, batch, stage)

        def _timed(self, name: str, work: Any, *arguments: Any) -> torch.Tensor:
            started = clock()
            self.times[f"{name}_wait"].append(started - self._ready)
            loss = work(*arguments)
            self._ready = clock()
            self.times[name].append(self._ready - started)
            return loss

    Clocked.__name__ = brain_class.__name__  # for SpeechBrain's log
    return Clocked


def for_one_epoch(hparams: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of a YAML file for one epoch in a folder of its own."""
    return hparams | {"epoch_counter": EpochCounter(limit=1), "output_folder": str(folder)}


def scaled(
    brain: Any, hparams: dict[str, Any], batches: dict[str, int], checks_s: float, share: float
) -> dict[str, Any]:
    """Return hours before, in training and in validation, from the times of a clocked Brain.

    Arguments
    ---------
    brain : Loop
        What `clocked` returned, after its epoch.
    hparams : dict
        Values of the YAML file.
    batches : dict
        Batches of a whole epoch, by `train_split` and `valid_split`.
    checks_s : float
        Time that a technique spent on checking the sampled utterances; it may run a teacher there.
    share : float
        Sampled share of the audio for training.
    """
    epochs, workers = hparams["epoch_counter"].limit, hparams["num_workers"]

    def step_s(name: str) -> float:
        work_s, loading_s = mean(brain.times[name]), mean(brain.times[f"{name}_wait"])
        return max(work_s, loading_s / workers) if workers else work_s + loading_s

    fills = any(hparams.get(key) for key in brain.filled_before_training)
    preparation_s = (checks_s + brain.preparation_s) / share if fills else 0.0
    return {
        "epochs": epochs, "batches_per_epoch": batches["train_split"], "batch_s": mean(brain.times["fit"]),
        "loading_s": mean(brain.times["fit_wait"]), "num_workers": workers, "preparation_h": preparation_s / 3600,
        "training_h": epochs * batches["train_split"] * step_s("fit") / 3600,
        "validation_h": epochs * batches["valid_split"] * step_s("valid") / 3600,
    }  # fmt: skip


def testing_h(
    brain_class: type[RecipeBrain], hparams: dict[str, Any], model: Path, benchmarks: list[Benchmark], device: str
) -> float:
    """Return the hours that evaluating a model folder takes: scoring on `device`, and timing on all that the run times."""
    transcriber = brain_class.load(str(model), hparams)
    brain_class.apply_eval_settings(transcriber, hparams)
    passes = dict.fromkeys(devices_to_time(hparams["runtime_devices"], device), 0)
    if hparams["measure_runtime"]:
        passes = dict.fromkeys(passes, 2 * hparams["runtime_repeats"])  # at two batch sizes
    passes[device] = passes.get(device, 0) + 1 + bool(hparams["measure_macs"])
    seconds = 0.0
    for place, count in passes.items():
        transcriber.to(place)
        for benchmark in benchmarks:
            chosen = middles(np.array([row["duration"] for row in benchmark.rows]))
            times = []
            for rows, wavs, wav_lens in iterate_batches([benchmark.rows[i] for i in chosen], 1):
                started = clock()
                transcribe_rows(transcriber, rows, wavs.to(place), wav_lens.to(place))
                times.append(clock() - started)
            seconds += count * mean(times) * len(benchmark.rows)
    return seconds / 3600


def memory_gb(device: str) -> dict[str, float]:
    """Return the greatest memory that this process has used, and that it has reserved on the GPU, in 10^9 bytes."""
    found = {"memory_gb": (peak_memory_bytes("cpu") or 0) / 1e9}
    if device.startswith("cuda"):
        found["gpu_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def checkpoint_gb(folder: Path) -> float:
    """Return the size of the largest checkpoint in a folder."""
    return max(map(folder_bytes, folder.iterdir()), default=0) / 1e9


def shown(hours: float) -> str:
    """Format a time, in minutes if it is less than an hour."""
    return f"{hours:8.1f} h  " if hours >= 1 else f"{60 * hours:8.1f} min"


def report(estimate: dict[str, Any], file: Path | None) -> None:
    """Print an estimate and, if a file is given, write it as JSON."""
    e = estimate
    loading = f"{e['loading_s']:.2f} s of loading" + (f" by {e['num_workers']} workers" if e["num_workers"] else "")
    before = f"  before training {shown(e['preparation_h'])}   at most: a pass over all audio, if nothing is cached yet"
    lines = [
        f"estimate for {e['experiment']} on {e['device']}, {e['precision']}:",
        before if e["preparation_h"] else "",
        f"  training        {shown(e['training_h'])}   {e['epochs']} epochs of {e['batches_per_epoch']} batches, "
        f"{e['batch_s']:.2f} s a batch and {loading}",
        f"  validation      {shown(e['validation_h'])}   after each epoch",
        f"  testing         {shown(e['testing_h'])}   untrained model, without a language model",
        f"  total           {shown(e['total_h'])}",
        f"  memory          {e['memory_gb']:8.1f} GB"
        + (f", of the GPU {e['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in e else ""),
        f"  checkpoint      {e['checkpoint_gb']:8.2f} GB",
    ]
    print("\n".join(line for line in lines if line))
    if file is not None:
        atomic_write_text(file, json.dumps({"format": FORMAT} | estimate, indent=1) + "\n")
        print(f"estimate: {file}")


def summed(estimates: Iterable[dict[str, Any]]) -> str:
    """Return one line on several estimates: the hours of all, the memory of the greatest."""
    found = list(estimates)
    if not found:
        return "no training to estimate"
    gpu = [e["gpu_memory_gb"] for e in found if "gpu_memory_gb" in e]
    memory = f"at most {max(e['memory_gb'] for e in found):.1f} GB of memory"
    memory += f", {max(gpu):.1f} GB of the GPU" if gpu else ""
    return f"{len(found)} trainings: {shown(sum(e['total_h'] for e in found)).strip()}, {memory}"


if __name__ == "__main__":
    print(summed(json.loads(path.read_text(encoding="utf-8")) for path in map(Path, sys.argv[1:])))
