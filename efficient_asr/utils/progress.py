"""A progress bar in whole seconds of audio, with an estimate of the remaining time."""

from __future__ import annotations

import math
from typing import Any

from tqdm import tqdm


class AudioProgress:
    """Progress bar over seconds of audio; a context manager.

    Arguments
    ---------
    total_s : float
        Seconds of audio in all.
    desc : str
        What is being done.
    **options
        Passed to tqdm.
    """

    def __init__(self, total_s: float, desc: str, **options: Any) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s of audio [{elapsed}<{remaining}]"
        self._bar = tqdm(total=max(1, math.ceil(total_s)), desc=desc, bar_format=form, mininterval=1, **options)
        self._done_s = 0.0

    def advance(self, seconds: float) -> None:
        """Add seconds of audio."""
        self._done_s += seconds
        self._bar.update(min(self._bar.total, round(self._done_s)) - self._bar.n)

    def __enter__(self) -> AudioProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
