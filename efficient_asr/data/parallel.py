"""The same work on many things, on all CPU cores, in order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from efficient_asr.errors import UserError

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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a parent that was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _work(item)
