"""Decode files of visitors, each in a process of its own: a file that crashes the decoder does not end the app."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE, AudioReport, inspect_audio, load_audio
from efficient_asr.utils.errors import UserError

HEADER_S, SAMPLES_S, LONGEST_TIMEOUT_S = (
    15.0,
    30.0,
    3600.0,
)  # for samples, a second is added for each minute that is allowed
MEMORY_BYTES, BYTES_PER_S = 2 << 30, 12 * 96_000  # on top of what a process has loaded; of recordings at up to 96 kHz
_checking = threading.BoundedSemaphore(os.cpu_count() or 1)
_start: list[Any] = []  # how processes are started


def start() -> None:
    """Start the process that others are forked from. Its socket lies in the temporary folder of this moment."""
    if _start:
        return
    if "forkserver" in multiprocessing.get_all_start_methods():
        try:
            multiprocessing.set_forkserver_preload([__name__])  # imported once; a process then starts in milliseconds
            forkserver.ensure_running()
            _start.append(multiprocessing.get_context("forkserver"))
            return
        except OSError:  # a path that is too long for a socket
            pass
    _start.append(multiprocessing.get_context("spawn"))


def decode(path: str, longest_s: float, samples: bool) -> tuple[AudioReport, torch.Tensor | None]:
    """Read the header of an audio file, and its samples if the header is that of a recording that is not too long.

    Arguments
    ---------
    path : str
        The file.
    longest_s : float
        Longest recording in seconds, whatever the header says.
    samples : bool
        Whether samples are wanted.

    Returns
    -------
    AudioReport
        What the header says; see `inspect_audio`.
    torch.Tensor or None
        Samples [time] at 16 kHz.

    Raises
    ------
    UserError
        If the samples cannot be decoded, the process died, or it took too long.
    """
    start()
    timeout_s = min(SAMPLES_S + longest_s / 60, LONGEST_TIMEOUT_S) if samples else HEADER_S
    with contextlib.nullcontext() if samples else _checking:  # samples are read by one request at a time already
        receiver, sender = _start[0].Pipe(duplex=False)
        process = _start[0].Process(target=_work, args=(sender, path, longest_s, samples, timeout_s), daemon=True)
        process.start()
        sender.close()
        with _killed_after(process, timeout_s) as is_late:
            try:
                return _received(receiver, longest_s)
            except (EOFError, OSError):
                process.join()
                late, code = f"it takes longer than {timeout_s:.0f} s to decode", process.exitcode
                crashed = f"it cannot be decoded; the decoder crashed or ran out of memory ({code})"
                raise UserError(f"{path}: {late if is_late.is_set() else crashed}") from None
            finally:
                receiver.close()
                process.kill()
                process.join()


@contextlib.contextmanager
def _killed_after(process: Any, timeout_s: float) -> Iterator[threading.Event]:
    """Kill a process if the context lasts too long, and set the event."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


def read(path: str, longest_s: float, samples: bool) -> tuple[AudioReport, torch.Tensor | None]:
    """Do the same in this process; see `decode`."""
    report = inspect_audio(path, samples=False)
    if not samples or report.problem or report.duration_s > longest_s:
        return report, None
    return report, load_audio(path, longest_s=longest_s)


def _received(receiver: Connection, longest_s: float) -> tuple[AudioReport, torch.Tensor | None]:
    """Return what a process sends: JSON, then the samples, if there are any. Nothing that it sends is executed."""
    answer = json.loads(receiver.recv_bytes(1 << 20))
    if "error" in answer:
        raise UserError(answer["error"])
    report = AudioReport(**answer["report"])
    if not answer["samples"]:
        return report, None
    content = receiver.recv_bytes(4 * int((min(longest_s, 1e8) + 1) * SAMPLE_RATE))
    return report, torch.frombuffer(bytearray(content), dtype=torch.float32)


def limit_process(longest_s: float, timeout_s: float) -> None:
    """Limit memory and time of this process as far as the system can, and let it leave no core dump."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_CPU: math.ceil(timeout_s) + 1, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + MEMORY_BYTES + int(min(longest_s, 1e8) * BYTES_PER_S)
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def _work(sender: Connection, path: str, longest_s: float, samples: bool, timeout_s: float) -> None:
    """Decode, in the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_process(longest_s, timeout_s)
    torch.set_num_threads(1)
    try:
        report, wav = read(path, longest_s, samples)
    except UserError as error:
        sender.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    sender.send_bytes(json.dumps({"report": report._asdict(), "samples": wav is not None}).encode())
    if wav is not None:
        sender.send_bytes(wav.contiguous().numpy().view("uint8"))
