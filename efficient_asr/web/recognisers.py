"""Models of the web app: one recording at a time, and what each technique did and cost."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from efficient_asr.web.turns import Turns

SHOWN_EVERY_S, HEARTBEAT_S = 0.1, 0.5
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
    turns : Turns
        Shared by all models of a process: one piece of a recording is computed at a time.
    """

    def __init__(self, name: str, transcriber: Transcriber, turns: Turns) -> None:
        self.name, self.transcriber, self.turns = name, transcriber, turns

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

    def stream(
        self, recording: torch.Tensor | Callable[[], torch.Tensor], language: str | None = None, count: bool = False
    ) -> Iterator[Heard]:
        """Transcribe a recording; yield what was heard so far, at least twice a second, the last time with everything.

        Arguments
        ---------
        recording : torch.Tensor or callable
            Audio at 16 kHz, [time]; or a function that returns it, called when it is this recording's turn.
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
        job = _Job(self, recording, language, count)
        threading.Thread(target=job.run, name=f"recogniser {self.name}", daemon=True).start()
        heard = Heard()
        try:
            while True:
                try:
                    update = job.updates.get(timeout=HEARTBEAT_S)
                except queue.Empty:
                    yield heard  # whoever reads this may go away meanwhile
                    continue
                if update is None:
                    return
                if isinstance(update, BaseException):
                    raise update
                heard = update
                yield heard
        finally:
            job.stopped.set()

    def transcribe(self, recording: torch.Tensor | Callable[[], torch.Tensor], language: str | None = None) -> Heard:
        """Transcribe a recording; see `stream`."""
        last = Heard()
        for heard in self.stream(recording, language):
            last = heard
        return last

    @contextlib.contextmanager
    def speaking(self, language: str | None) -> Iterator[None]:
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


class _Job:
    """One recording for one model, transcribed in a thread; `updates` gets each `Heard`, and then None or an exception."""

    def __init__(
        self,
        recogniser: Recogniser,
        recording: torch.Tensor | Callable[[], torch.Tensor],
        language: str | None,
        count: bool,
    ) -> None:
        self.recogniser, self.recording, self.language, self.count = recogniser, recording, language, count
        self.updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.segments: list[dict[str, Any]] = []
        self.spent_s = self.duration_s = 0.0
        self.begun = self.shown = time.perf_counter()

    def run(self) -> None:
        """Transcribe, and put an end to `updates`."""
        try:
            self._transcribe()
            self.updates.put(None)
        except _Cancelled:
            self.updates.put(None)
        except BaseException as error:
            self.updates.put(error)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for a turn, and count the time from then on."""
        with self.recogniser.turns.mine():
            if self.stopped.is_set():
                raise _Cancelled
            self.begun = self.shown = time.perf_counter()
            with self.recogniser.speaking(self.language):
                yield
            self.spent_s += time.perf_counter() - self.begun

    def _transcribe(self) -> None:
        transcriber = self.recogniser.transcriber
        with self.recogniser.turns.mine():
            if self.stopped.is_set():
                raise _Cancelled
            wav = self.recording() if callable(self.recording) else self.recording
        self.duration_s = len(wav) / SAMPLE_RATE
        known = self.language if transcriber.takes_languages else None
        pieces = iterate_timed(transcriber, wav, known)
        while True:
            with self._turn(), listening(self._listen):
                piece = next(pieces, None)
            if piece is None:
                break
            self.segments += piece
            self.updates.put(self._heard())
        heard = self._heard()
        if self.count and transcriber.counts_macs and self.duration_s <= LONGEST_COUNTED_S:
            with self._turn():
                more = {"languages": [self.language]} if known else {}
                heard.macs_g = count_macs(transcriber.transcribe, wav[None], torch.ones(1), **more).macs / 1e9
        self.updates.put(heard)

    def _heard(self, words: str = "", more_s: float = 0.0) -> Heard:
        transcriber = self.recogniser.transcriber
        given = (self.language or transcriber.language) if transcriber.languages else None
        segments = [({"language": given} if given else {}) | segment for segment in self.segments]
        return Heard(text_of([*segments, {"text": words}]), segments, self.duration_s, self.spent_s + more_s)

    def _listen(self, tokens: torch.Tensor) -> None:
        """Report the words of the piece that is being decoded, from time to time."""
        if self.stopped.is_set():
            raise _Cancelled
        now = time.perf_counter()
        tokenizer = getattr(self.recogniser.transcriber.model, "tokenizer", None)  # models of a cascade have one each
        if now - self.shown >= SHOWN_EVERY_S and tokenizer is not None:
            self.shown = now
            words = tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)
            self.updates.put(self._heard(words, now - self.begun))
