"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from efficient_asr.utils import distributed


class StopRequest:
    """Whether somebody wants the training to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM as a request; a second Ctrl-C ends the training at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: Any) -> None:
            # torchrun passes a Ctrl-C on to processes that had it already: several are one there.
            if self.requested and distributed.world_size() == 1:
                raise KeyboardInterrupt("stopped at once; rerun the command to resume from the last checkpoint")
            self.requested = True

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
