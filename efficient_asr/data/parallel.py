"""Parallel map over all CPU cores, and a DataLoader whose workers handle signals safely."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from efficient_asr.utils.errors import UserError

Item, Outcome = TypeVar("Item"), TypeVar("Outcome")
_work: Callable[[Any], Any] | None = None  # set in worker processes
_PR_SET_PDEATHSIG = 1


def in_parallel(work: Callable[[Item], Outcome], items: Sequence[Item], worth_it: bool) -> Iterator[Outcome]:
    """Yield `work(item)` for each item, in order.

    Arguments
    ---------
    work : callable
        Inherited by the forked workers, so it does not need to be picklable.
    items : sequence
        Arguments of `work`.
    worth_it : bool
        Whether there is enough work for several processes. If not, or if processes cannot be forked, it runs in this process.
        (Threads would not help: reading the header of an audio file holds the GIL most of the time.)

    Raises
    ------
    UserError
        If a worker process died.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 2 or not worth_it or sys.platform != "linux":
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,))
    try:
        yield from pool.map(_call, items, chunksize=max(1, min(64, len(items) // (8 * workers))))
    except BrokenProcessPool:
        raise UserError("an audio worker process died: out of memory, or a file crashes the decoder") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)  # a fork does not copy the parent's threads, and waiting for them would hang
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _work(item)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent exits, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_ANSWERED_BY_MAIN = {signal.SIGTERM, signal.SIGINT}


class Loader(DataLoader):
    """DataLoader whose workers leave SIGTERM and SIGINT to the main process.

    Schedulers, `timeout` and terminals signal the whole process group. If the workers died from the signal, the main process
    could not finish writing its checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"worker_init_fn": ignore_signals, **kwargs})

    def __iter__(self) -> Iterator[Any]:
        """Start the workers with both signals blocked, so that no signal arrives before their handlers are set."""
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """Worker init function: leave SIGINT and SIGTERM to the main process, except a SIGTERM sent by the main process."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    parent = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=watch, daemon=True).start()
