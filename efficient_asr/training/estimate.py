"""How long a training takes and how much memory it needs, from a few batches that are timed on this machine.

    python recipes/<exp>/train.py hparams/<exp>.yaml --estimate
    ESTIMATE=1 bash scripts/reproduce_downsampling.sh /corpora/LibriSpeech     # every row of a table, and their sum

The batches of the first epoch are sorted by seconds of audio and padding, and cut into four parts; the batch in the middle of
each is timed. The mean of these, times the number of batches, is the time of an epoch. The longest batch runs first: it warms
up, and its memory is the peak. Validation is timed in the same way, and testing on one utterance of each part.

What differs from the run itself: texts that a model writes before it has learned anything may be longer or shorter, so that
validation and testing of Whispers are guesses; the disk may be slower than its cache; other work on the machine counts.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.data import BatchOrder, Rows, load_row
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.training.brain import RecipeBrain
from efficient_asr.utils.files import atomic_write_text

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


def middles(sizes: np.ndarray) -> list[int]:
    """Return the index of the greatest size, then those in the middle of `PARTS` parts of equal count, by size."""
    order = np.argsort(sizes, kind="stable")
    parts = np.array_split(order, min(PARTS, len(order)))
    return [int(order[-1]), *(int(part[len(part) // 2]) for part in parts)]


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


def clock() -> float:
    """Return the time in seconds when all work on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clocked(brain_class: type[RecipeBrain]) -> type[RecipeBrain]:
    """Return a Brain that notes how long batches of training and validation take, and how long they are waited for."""

    class Clocked(brain_class):  # type: ignore[misc, valid-type]
        """The same Brain with clocks."""

        times: dict[str, list[float]]

        def train(self, *loaders: Any) -> None:
            self.times, self.started = {"fit": [], "wait": [], "valid": []}, clock()
            super().train(*loaders)

        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.last = clock()
            self.preparation_s = self.last - self.started

        def fit_batch(self, batch: Any) -> torch.Tensor:
            started = clock()
            self.times["wait"].append(started - self.last)
            loss = super().fit_batch(batch)
            self.last = clock()
            self.times["fit"].append(self.last - started)
            return loss

        def evaluate_batch(self, batch: Any, stage: Any) -> torch.Tensor:
            started = clock()
            loss = super().evaluate_batch(batch, stage)
            self.times["valid"].append(clock() - started)
            return loss

    Clocked.__name__ = brain_class.__name__  # for SpeechBrain's log
    return Clocked


def for_one_epoch(run_opts: RunOptions) -> RunOptions:
    """Return SpeechBrain's options for an epoch of the given batches."""
    return dataclasses.replace(run_opts, debug=True, debug_batches=sys.maxsize, debug_epochs=1)


def without_warm_up(times: list[float]) -> float:
    """Return the mean of all times but the first, that of the longest batch."""
    return float(np.mean(times[1:] or times))


def testing_h(
    brain_class: type[RecipeBrain], hparams: dict[str, Any], folder: Path, benchmarks: list[Benchmark], device: str
) -> float:
    """Return the hours that evaluating a model takes; language models are not counted."""
    transcriber = brain_class.load(str(folder), hparams).to(device)
    seconds = 0.0
    for benchmark in benchmarks:
        durations = np.array([row["duration"] for row in benchmark.rows])
        times, audio_s = [], []
        for i in middles(durations):
            row = benchmark.rows[i]
            if transcriber.languages and row.get("language") in transcriber.languages:
                transcriber.language = row["language"]
            wav = load_row(row)
            started = clock()
            transcriber.transcribe(wav[None], torch.ones(1))
            times.append(clock() - started)
            audio_s.append(len(wav))
        seconds += without_warm_up(times) * len(durations)
    passes = 1 + bool(hparams["measure_macs"])
    passes += 2 * hparams["runtime_repeats"] if hparams["measure_runtime"] else 0  # at two batch sizes
    return seconds * passes / 3600


def memory_gb() -> dict[str, float]:
    """Return the greatest memory that this process has used, and that of the GPU."""
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes or kilobytes
    found = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        found["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def scaled(
    brain: Any, hparams: dict[str, Any], batches: dict[str, int], checks_s: float, share: float
) -> dict[str, Any]:
    """Return hours of training and validation from the times of a clocked Brain.

    Arguments
    ---------
    brain : Loop
        What `clocked` returned, after its epoch.
    hparams : dict
        Values of the YAML file.
    batches : dict
        Batches of a whole epoch, by `train_split` and `valid_split`.
    checks_s : float
        Time that checking the sampled utterances took; a technique may run a teacher there.
    share : float
        Sampled share of the audio for training.
    """
    epochs, workers = hparams["epoch_counter"].limit, hparams["num_workers"]
    batch_s, loading_s = without_warm_up(brain.times["fit"]), without_warm_up(brain.times["wait"])
    step_s = max(batch_s, loading_s / workers) if workers else batch_s + loading_s
    passes = any(hparams.get(key) for key in brain.caches)
    preparation_s = (checks_s + brain.preparation_s) / share if passes else 0.0
    validation_s = without_warm_up(brain.times["valid"]) * batches["valid_split"]
    return {
        "epochs": epochs, "batches_per_epoch": batches["train_split"], "batch_s": batch_s, "loading_s": loading_s,
        "num_workers": workers, "preparation_h": preparation_s / 3600,
        "training_h": epochs * batches["train_split"] * step_s / 3600, "validation_h": epochs * validation_s / 3600,
    }  # fmt: skip


def shown(hours: float) -> str:
    """Format a time, in minutes if it is less than an hour."""
    return f"{hours:8.1f} h  " if hours >= 1 else f"{60 * hours:8.1f} min"


def report(estimate: dict[str, Any], file: Path | None) -> None:
    """Print an estimate and, if a file is given, write it as JSON."""
    e = estimate
    loading = f"{e['loading_s']:.2f} s of loading" + (f" by {e['num_workers']} workers" if e["num_workers"] else "")
    lines = [
        f"estimate for {e['experiment']} on {e['device']}, {e['precision']}:",
        f"  before training {shown(e['preparation_h'])}   a teacher's pass over all audio" if e["preparation_h"] else "",
        f"  training        {shown(e['training_h'])}   {e['epochs']} epochs of {e['batches_per_epoch']} batches, "
        f"{e['batch_s']:.2f} s a batch and {loading}",
        f"  validation      {shown(e['validation_h'])}   after each epoch",
        f"  testing         {shown(e['testing_h'])}   batch 1, untrained model, without a language model",
        f"  total           {shown(e['total_h'])}",
        f"  memory          {e['memory_gb']:8.1f} GB"
        + (f", of the GPU {e['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in e else ""),
        f"  checkpoint      {e['checkpoint_gb']:8.2f} GB",
    ]  # fmt: skip
    print("\n".join(line for line in lines if line))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps({"format": FORMAT} | estimate, indent=1) + "\n")
        print(f"estimate: {file}")


def size_gb(folder: Path) -> float:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def remove(folder: Path) -> None:
    """Remove what an estimate wrote."""
    shutil.rmtree(folder, ignore_errors=True)


def summed(estimates: Iterable[dict[str, Any]]) -> str:
    """Return one line on several estimates: the hours of all, the memory of the greatest."""
    found = list(estimates)
    hours = sum(e["total_h"] for e in found)
    gpu = [e["gpu_memory_gb"] for e in found if "gpu_memory_gb" in e]
    memory = f"at most {max(e['memory_gb'] for e in found):.1f} GB of memory" if found else "nothing to train"
    return f"{len(found)} runs: {shown(hours).strip()}, {memory}" + (f", {max(gpu):.1f} GB of the GPU" if gpu else "")


if __name__ == "__main__":
    print(summed(json.loads(path.read_text(encoding="utf-8")) for path in map(Path, sys.argv[1:])))
