"""Treat Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from efficient_asr.utils import distributed


class StopRequest:
    """Flag set when a stop of the training is requested."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat Ctrl-C and SIGTERM as stop requests; a second Ctrl-C stops the training immediately."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: Any) -> None:
            # torchrun forwards Ctrl-C to processes that have already received it, so repeats are ignored there.
            if self.requested and distributed.world_size() == 1:
                raise KeyboardInterrupt("stopped immediately; rerun the command to resume from the last checkpoint")
            self.requested = True

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
