"""Wall-clock time under fixed conditions.

A run processes all batches of the benchmark. Loading and padding audio is not timed; features, model, decoding and
detokenising are, and the device is synchronised before each clock reading. After a warm-up, whole runs are repeated, and their
median and range are recorded.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Rows, iterate_batches
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.utils.devices import clock

WARM_UP_BATCHES = 2
LONG_S = 20.0  # announce timings that are expected to take longer
MANY, CACHE_VARIABLE = 500, "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def limit_convolution_cache(utterances: int) -> None:
    """Limit the memory of oneDNN's cache if this many utterances, each with its own length, are processed.

    torch's convolutions on the CPU cache compiled code for the last 1024 shapes, which can take a gigabyte. With more than
    `MANY` utterances, a shape is evicted before it recurs, so a smaller cache costs no time. This only takes effect if no
    convolution has run yet in this process; the Result's provenance records the setting.
    """
    if utterances > MANY:
        os.environ.setdefault(CACHE_VARIABLE, "64")


def device_name(device: str) -> str:
    """Return a human-readable name of the device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def reset_peak_memory(device: str) -> None:
    """Start a new measurement of `peak_memory_bytes`."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:  # Linux: reset the process's high-water mark
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak_memory_bytes(device: str) -> int | None:
    """Return the peak of the device's allocations, or of the process's resident memory on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_runtime(
    transcriber: Transcriber, rows: Rows, device: str, batch_size: int, repeats: int, lm: bool
) -> dict[str, Any]:
    """Time a transcriber over utterances.

    Arguments
    ---------
    transcriber : Transcriber
        The transcriber; it is moved to `device`.
    rows : Rows
        Utterances; batches are sorted by duration, as in a typical batch job.
    device : str
        `cpu` or `cuda`.
    batch_size : int
        Utterances per batch.
    repeats : int
        Number of runs over all utterances.
    lm : bool
        Whether the transcriber uses a language model; recorded in the result.

    Returns
    -------
    dict
        One entry of `runtimes` in the Result.
    """
    transcriber.to(device)
    rows = rows.select(rows.durations.argsort(kind="stable")) if batch_size > 1 else rows
    audio_s = float(rows.durations.sum())

    label = f"timing {device}, batch {batch_size}{', LM' if lm else ''}"
    rate = 0.0
    for chunk, wavs, wav_lens in iterate_batches(rows[-batch_size * WARM_UP_BATCHES :], batch_size):
        start = clock(device)
        transcribe_rows(transcriber, chunk, wavs.to(device), wav_lens)
        rate = (clock(device) - start) / sum(row["duration"] for row in chunk)
    if (estimate_s := rate * audio_s * repeats) > LONG_S:
        print(f"{label}: {repeats} runs of {len(rows)} utterances, about {estimate_s / 60:.1f} min", file=sys.stderr)
    reset_peak_memory(device)
    times = []
    with tqdm(total=repeats * len(rows), desc=label, unit="utt", leave=False, mininterval=1) as progress:
        for _ in range(repeats):
            total = 0.0
            for chunk, wavs, wav_lens in iterate_batches(rows, batch_size):
                wavs, wav_lens = wavs.to(device), wav_lens.to(device)
                start = clock(device)
                transcribe_rows(transcriber, chunk, wavs, wav_lens)
                total += clock(device) - start
                progress.update(len(chunk))
            times.append(total)
    runtime_s = statistics.median(times)
    return {
        "device": device.split(":")[0],
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "lm": lm,
        "runtime_s": runtime_s,
        "runtime_min_s": min(times),
        "runtime_max_s": max(times),
        "repeats": repeats,
        "rtfx": audio_s / runtime_s,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
