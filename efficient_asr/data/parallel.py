"""The same work on many things, on all CPU cores, in order; and processes that load data while others train."""

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
_work: Callable[[Any], Any] | None = None  # in a worker
_PR_SET_PDEATHSIG = 1


def in_parallel(work: Callable[[Item], Outcome], items: Sequence[Item], worth_it: bool) -> Iterator[Outcome]:
    """Yield `work(item)` for each item, in order.

    Arguments
    ---------
    work : callable
        Reaches the workers when they are forked, so it need not be picklable.
    items : sequence
        What to work on.
    worth_it : bool
        Whether there is enough to do; otherwise, and where processes cannot be forked, it is done in this one. (Threads would
        not help: reading an audio file's header holds Python's lock most of the time.)

    Raises
    ------
    UserError
        Where a worker died.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 2 or not worth_it or sys.platform != "linux":
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,))
    try:
        yield from pool.map(_call, items)
    except BrokenProcessPool:
        raise UserError(
            "a process that was reading audio died: the memory is exhausted, or a file makes the decoder crash"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)  # the threads of the process that was forked are not there, and would be waited for
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _work(item)


def _die_with_parent() -> None:
    """Let the system end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_ANSWERED_BY_MAIN = {signal.SIGTERM, signal.SIGINT}


class Loader(DataLoader):
    """A DataLoader whose processes leave SIGTERM and SIGINT to the main process.

    Schedulers, `timeout` and a terminal signal the whole process group. Loading processes that died of it would take along the
    checkpoint that the main process is about to write.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"worker_init_fn": ignore_signals, **kwargs})

    def __iter__(self) -> Iterator[Any]:
        """Start the processes; they are born with both signals blocked, so that none can come too early."""
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """In a process that loads data: leave Ctrl-C and SIGTERM to the main process, unless it is the one that sends it."""
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
