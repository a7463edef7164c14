"""Limits of the web app: sizes, lengths, and how much one visitor may ask for at once."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from efficient_asr.utils.errors import UserError
from efficient_asr.web.decoder import decode

# Hosts from which links may be fetched, with their subdomains.
LINK_HOSTS = (
    "youtube.com",
    "youtu.be",
    "vimeo.com",
    "archive.org",
    "soundcloud.com",
    "ted.com",
    "commons.wikimedia.org",
)


class Busy(UserError):
    """There are too many requests, of one visitor or of all."""


@dataclass(frozen=True)
class Limits:
    """What the app accepts.

    Attributes
    ----------
    longest_s : float
        Longest recording.
    largest_mb : float
        Largest upload or download.
    per_user : int
        Requests of one page, waiting or running.
    per_address : int
        Requests of one network address, waiting or running.
    waiting : int
        Requests of all users, waiting or running.
    link_hosts : tuple of str
        Hosts from which links may be fetched, with their subdomains.
    link_timeout_s : float
        Longest time to fetch a link.
    """

    longest_s: float = 3600.0
    largest_mb: float = 200.0
    per_user: int = 2
    per_address: int = 32
    waiting: int = 64
    link_hosts: tuple[str, ...] = LINK_HOSTS
    link_timeout_s: float = 120.0

    @property
    def largest_bytes(self) -> int:
        """`largest_mb` in bytes."""
        return int(self.largest_mb * 1e6)

    def check(self, path: str | Path, name: str = "the recording") -> None:
        """Check the size and the header of an uploaded or fetched file.

        Raises
        ------
        UserError
            If it is too large or too long, or not audio; the message does not show where the file is.
        """
        self._decode(path, name, samples=False)

    def read(self, path: str | Path, name: str = "the recording") -> torch.Tensor:
        """Return the audio [time] of an uploaded or fetched file; see `check`."""
        return self._decode(path, name, samples=True)

    def _decode(self, path: str | Path, name: str, samples: bool) -> torch.Tensor | None:
        if not Path(path).is_file():
            raise UserError(f"{name} is not here any more; upload it again")
        size = Path(path).stat().st_size
        if size > self.largest_bytes:
            raise UserError(f"{name} has {size / 1e6:.3g} MB; the limit is {self.largest_mb:g} MB")
        try:
            report, wav = decode(str(path), self.longest_s, samples)
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from None
        if report.duration_s > self.longest_s:
            raise UserError(f"{name} lasts {_length(report.duration_s)}; the limit is {_length(self.longest_s)}")
        if report.problem:
            raise UserError(report.problem.replace(str(path), name))
        return wav


def _length(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"


class Visitors:
    """Counts the requests that wait or run.

    Arguments
    ---------
    limits : Limits
        How many there may be.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.counts, self.lock = limits, Counter(), threading.Lock()

    @contextlib.contextmanager
    def enter(self, user: str | None, address: str | None) -> Iterator[None]:
        """Count a request of a page (`user`) and of a network address within the context.

        Raises
        ------
        Busy
            If there are too many already.
        """
        counted = [("all", self.limits.waiting, "the app is busy"), (f"address {address}", self.limits.per_address, "")]
        counted += [(f"user {user}", self.limits.per_user, "")] if user else []
        with self.lock:
            for key, most, message in counted:
                if self.counts[key] >= most:
                    raise Busy(f"{message or f'you have {most} requests already'}; try again in a moment")
            self.counts.update(key for key, *_ in counted)
        try:
            yield
        finally:
            with self.lock:
                self.counts.subtract(key for key, *_ in counted)
                self.counts += Counter()  # forget those that are 0
