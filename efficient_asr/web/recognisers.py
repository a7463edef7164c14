"""Models of the web app: one recording at a time, and what each technique did and cost."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.inference.long_audio import text_of
from efficient_asr.inference.recordings import iterate_timed
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.models.whisper.greedy import listening
from efficient_asr.utils.errors import UserError

SHOWN_EVERY_S = 0.1
LONGEST_COUNTED_S = 60.0  # MACs are counted by transcribing again
_NOT_SHOWN = ("start_s", "end_s", "text", "language")


@dataclass
class Heard:
    """What a model has heard so far.

    Attributes
    ----------
    text : str
        The transcript, with the words of the piece that is being decoded.
    segments : list of dict
        `start_s`, `end_s` and `text` of the finished parts, and what the technique did.
    duration_s : float
        Length of the recording.
    seconds : float
        Time of computation, without waiting for others.
    macs_g : float or None
        Billions of multiply-accumulates, if they were counted.
    """

    text: str = ""
    segments: list[dict[str, Any]] = field(default_factory=list)
    duration_s: float = 0.0
    seconds: float = 0.0
    macs_g: float | None = None

    @property
    def languages(self) -> list[str]:
        """Languages that were given or detected."""
        return list(dict.fromkeys(s["language"] for s in self.segments if s.get("language")))

    def decisions(self) -> dict[str, str]:
        """Return what the technique did: the mean of numbers, the counts of words."""
        found: dict[str, list[Any]] = {}
        for segment in self.segments:
            for key, value in segment.items():
                if key not in _NOT_SHOWN and isinstance(value, (bool, int, float, str)):
                    found.setdefault(key, []).append(value)
        return {key.replace("_", " "): _summary(values) for key, values in found.items()}


def _summary(values: list[Any]) -> str:
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        mean = sum(values) / len(values)
        return f"{mean:g}" if len(values) == 1 and isinstance(values[0], int) else f"{mean:.3g}"
    counts = Counter(str(value) for value in values)
    return ", ".join(value if len(counts) == 1 else f"{value} {count}×" for value, count in counts.most_common())


class _Cancelled(Exception):
    """Nobody waits for the transcript any more."""


class Recogniser:
    """A model of the app.

    Arguments
    ---------
    name : str
        Shown to users, and the name of the model for programs.
    transcriber : Transcriber
        The model.
    lock : threading.Lock
        Shared by all models of a process: one recording is computed at a time.
    """

    def __init__(self, name: str, transcriber: Transcriber, lock: threading.Lock) -> None:
        self.name, self.transcriber, self.lock = name, transcriber, lock

    @property
    def technique(self) -> str:
        """Technique and variant, for people."""
        parts = [self.transcriber.technique, self.transcriber.label, *self.transcriber.changes]
        return ", ".join(dict.fromkeys(part for part in parts if part not in ("none", "baseline"))) or "baseline"

    def check_language(self, language: str | None) -> None:
        """Reject a language that the model does not know.

        Raises
        ------
        UserError
            Naming the model.
        """
        known = self.transcriber.languages
        if language is not None and known and language not in known:
            raise UserError(f"{self.name} does not know the language '{language}'")

    def stream(self, wav: torch.Tensor, language: str | None = None, count: bool = False) -> Iterator[Heard]:
        """Transcribe a recording [time]; yield what was heard so far, the last time with everything.

        Arguments
        ---------
        wav : torch.Tensor
            Audio at 16 kHz, [time].
        language : str, optional
            ISO 639-1 code; None to detect it, if the model can.
        count : bool
            Count MACs as well, which transcribes again; recordings above `LONGEST_COUNTED_S` are not counted.

        Raises
        ------
        UserError
            If the model does not know the language.
        """
        self.check_language(language)
        updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped = threading.Event()
        worker = threading.Thread(
            target=self._work,
            args=(wav, language, count, updates, stopped),
            name=f"recogniser {self.name}",
            daemon=True,
        )
        worker.start()
        try:
            while True:
                update = updates.get()
                if update is None:
                    return
                if isinstance(update, BaseException):
                    raise update
                yield update
        finally:
            stopped.set()

    def transcribe(self, wav: torch.Tensor, language: str | None = None) -> Heard:
        """Transcribe a recording [time]; see `stream`."""
        heard = Heard(duration_s=len(wav) / SAMPLE_RATE)
        return [heard, *self.stream(wav, language)][-1]

    def _work(
        self,
        wav: torch.Tensor,
        language: str | None,
        count: bool,
        updates: queue.SimpleQueue[Any],
        stopped: threading.Event,
    ) -> None:
        """Transcribe in a thread of its own: put each `Heard`, then None, or an exception."""
        try:
            with self.lock:
                for heard in self._hear(wav, language, count, updates, stopped):
                    updates.put(heard)
            updates.put(None)
        except _Cancelled:
            updates.put(None)
        except BaseException as error:
            updates.put(error)

    def _hear(
        self,
        wav: torch.Tensor,
        language: str | None,
        count: bool,
        updates: queue.SimpleQueue[Any],
        stopped: threading.Event,
    ) -> Iterator[Heard]:
        segments: list[dict[str, Any]] = []
        start = shown = time.perf_counter()
        duration_s = len(wav) / SAMPLE_RATE
        tokenizer = getattr(self.transcriber.model, "tokenizer", None)  # models of a cascade have one each

        def listen(tokens: torch.Tensor) -> None:
            nonlocal shown
            now = time.perf_counter()
            if stopped.is_set():
                raise _Cancelled
            if now - shown >= SHOWN_EVERY_S:
                shown = now
                if tokenizer is not None:
                    words = tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)
                    updates.put(Heard(text_of([*segments, {"text": words}]), [*segments], duration_s, now - start))

        known = language if self.transcriber.takes_languages else None
        with self._speaking(language), listening(listen):
            for piece in iterate_timed(self.transcriber, wav, known):
                if stopped.is_set():
                    raise _Cancelled
                segments += piece
                yield Heard(text_of(segments), [*segments], duration_s, time.perf_counter() - start)
            heard = Heard(text_of(segments), segments, duration_s, time.perf_counter() - start)
        if count and self.transcriber.counts_macs and duration_s <= LONGEST_COUNTED_S:
            with self._speaking(language):
                more = {"languages": [language]} if known else {}
                heard.macs_g = count_macs(self.transcriber.transcribe, wav[None], torch.ones(1), **more).macs / 1e9
        yield heard

    @contextlib.contextmanager
    def _speaking(self, language: str | None) -> Iterator[None]:
        """Set the language of the transcriber within the context, if it has a choice."""
        if language is None or self.transcriber.takes_languages or not self.transcriber.languages:
            yield
            return
        before = self.transcriber.language
        self.transcriber.language = language
        try:
            yield
        finally:
            self.transcriber.language = before
