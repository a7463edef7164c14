"""Decode files of visitors, each in a process of its own: a file that crashes the decoder does not end the app."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

import torch

from efficient_asr.data import SAMPLE_RATE, AudioReport, inspect_audio, load_audio
from efficient_asr.utils.errors import UserError

TIMEOUT_S = 30.0  # and a second for each minute of the longest recording
MEMORY_BYTES = (
    6 << 30
)  # address space of a process with what it has loaded; 16 bytes are added for each sample of the longest recording
_WAY = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_context = multiprocessing.get_context(_WAY)
_at_once = threading.BoundedSemaphore(os.cpu_count() or 1)


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
    timeout_s = TIMEOUT_S + longest_s / 60
    with _at_once:
        if _WAY == "forkserver":
            _context.set_forkserver_preload([__name__])  # imported once; a process then starts in milliseconds
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_work, args=(sender, path, longest_s, samples, timeout_s), daemon=True)
        process.start()
        sender.close()
        try:
            return _received(receiver, path, timeout_s)
        finally:
            receiver.close()
            process.kill()
            process.join()


def read(path: str, longest_s: float, samples: bool) -> tuple[AudioReport, torch.Tensor | None]:
    """Do the same in this process; see `decode`."""
    report = inspect_audio(path, samples=False)
    if not samples or report.problem or report.duration_s > longest_s:
        return report, None
    return report, load_audio(path, longest_s=longest_s)


def _received(receiver: Connection, path: str, timeout_s: float) -> tuple[AudioReport, torch.Tensor | None]:
    """Return what a process sends: JSON, then the samples, if there are any. Nothing that it sends is executed."""
    if not receiver.poll(timeout_s):
        raise UserError(f"{path}: it takes longer than {timeout_s:.0f} s to decode")
    try:
        answer = json.loads(receiver.recv_bytes())
        if "error" in answer:
            raise UserError(answer["error"])
        report = AudioReport(**answer["report"])
        wav = torch.frombuffer(bytearray(receiver.recv_bytes()), dtype=torch.float32) if answer["samples"] else None
    except (EOFError, OSError):
        raise UserError(f"{path}: it cannot be decoded; the decoder crashed, or ran out of memory") from None
    return report, wav


def limit_process(longest_s: float, timeout_s: float, memory_bytes: int = MEMORY_BYTES) -> None:
    """Limit memory and time of this process, and let it leave no core dump."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    memory = memory_bytes + 16 * int(min(longest_s, 1e6) * SAMPLE_RATE)
    limits = ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, math.ceil(timeout_s)), (resource.RLIMIT_CORE, 0))
    for limit, value in limits:
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
