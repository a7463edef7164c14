"""Long audio with models that take a window: cut, transcribe, join. Works with every Transcriber that has a `window_s`.

- `overlap`: windows that overlap; neighbouring texts are joined in the middle of the longest run of words that both end and
  beginning share.
- `pauses`: pieces between pauses of speech, found by Silero's voice activity detector (package `silero-vad`) or, without it, by
  energy; pieces are as long as fits into a window, and long silence is left out.
- `sequential`: Whisper's own algorithm, each window starting where the last timestamp of the one before ended. Slower,
  since windows cannot be batched, and Whisper only.

Audio that fits into the window passes through untouched, whatever the method.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE, absolute_lengths, pad_wavs
from efficient_asr.errors import UserError, did_you_mean
from efficient_asr.evaluation.transcript import Transcript

METHODS = ("overlap", "pauses", "sequential")
OVERLAP_S = 5.0
FRAME = SAMPLE_RATE // 50


class LongAudio:
    """A Transcriber for audio of any length around one that takes a window.

    Arguments
    ---------
    transcriber : Transcriber
        With `window_s`.
    method : str
        `overlap`, `pauses` or `sequential`.
    batch_size : int
        Pieces of one recording that are transcribed together.

    Raises
    ------
    UserError
        For another method, or one that the transcriber cannot.
    """

    def __init__(self, transcriber: Any, method: str = "overlap", batch_size: int = 8) -> None:
        if method not in METHODS:
            raise UserError(f"long audio: '{method}' is not {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
        if method == "sequential" and not hasattr(transcriber, "transcribe_sequentially"):
            raise UserError("long audio: only a plain Whisper transcribes sequentially; take overlap or pauses")
        self.transcriber, self.method, self.batch_size = transcriber, method, batch_size
        self.window = round(transcriber.window_s * SAMPLE_RATE)

    def __getattr__(self, name: str) -> Any:
        """Everything else (`to`, `model`, `batched`, `language`, ...) is the transcriber's."""
        if name == "transcriber":
            raise AttributeError(name)
        return getattr(self.transcriber, name)

    @property
    def language(self) -> str | None:
        """Language of the audio, where the transcriber has one."""
        return self.transcriber.language

    @language.setter
    def language(self, language: str | None) -> None:
        self.transcriber.language = language

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch], of any length.

        `languages` [batch] are for transcribers that take them.
        """
        lengths = absolute_lengths(wavs, wav_lens)
        short = (lengths <= self.window).nonzero().flatten().tolist()
        out: list[Transcript | None] = [None] * len(wavs)
        if short:
            longest = max(1, int(lengths[short].max()))
            known = {"languages": [languages[row] for row in short]} if languages else {}
            found = self.transcriber.transcribe(wavs[short, :longest], lengths[short] / longest, **known)
            for row, transcript in zip(short, found, strict=True):
                out[row] = transcript
        for row in range(len(wavs)):
            if out[row] is None:
                out[row] = self._transcribe_long(wavs[row, : lengths[row]], languages[row] if languages else None)
        return out

    def _transcribe_long(self, wav: torch.Tensor, language: str | None) -> Transcript:
        """Transcribe one recording [time], in a language where it is known for this one."""
        known = {"language": language} if language else {}
        if self.method == "sequential":
            return self.transcriber.transcribe_sequentially(wav, **known)
        overlap = min(round(OVERLAP_S * SAMPLE_RATE), self.window // 3)
        if self.method == "overlap":
            spans = list(overlapping(len(wav), self.window, overlap))
        else:
            spans = speech_spans(wav, self.window)
        parts: list[Transcript] = []
        for i in range(0, len(spans), self.batch_size):
            pieces = [wav[start:end] for start, end in spans[i : i + self.batch_size]]
            each = {"languages": [language] * len(pieces)} if language else {}
            parts += self.transcriber.transcribe(*pad_wavs(pieces), **each)
        texts = [part.text for part in parts]
        if self.method == "overlap":
            text = join_overlapping(texts, [overlap / (end - start) for start, end in spans])
        else:
            text = " ".join(filter(None, texts))
        segments: list[dict[str, Any]] = []
        for (start, end), part in zip(spans, parts, strict=True):
            start_s, inner = start / SAMPLE_RATE, part.details.get("segments")
            times = {"start_s": start_s, "end_s": end / SAMPLE_RATE, "text": part.text}
            rest = {key: value for key, value in part.details.items() if key != "segments"}
            segments += (
                [s | {k: s[k] + start_s for k in ("start_s", "end_s") if s[k] is not None} for s in inner]
                if inner
                else [times | rest]
            )
        return Transcript(text, {"windows": len(spans), "long_audio": self.method, "segments": segments})


def overlapping(samples: int, window: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of windows, each sharing `overlap` samples with the one before; the last may be shorter."""
    start = 0
    while True:
        yield start, min(samples, start + window)
        if start + window >= samples:
            return
        start += window - overlap


def join_overlapping(texts: list[str], shares: list[float]) -> str:
    """Join texts of windows whose ends and beginnings tell of the same audio.

    Among the words that the overlap may hold (its share of the audio, half as much again, and two more), the longest run that
    both texts have is where they are joined, in its middle. Without a run of at least two words both are cut in the
    middle of the overlap.

    Arguments
    ---------
    texts : list of str
        In order.
    shares : list of float
        Which part of each window overlaps with one neighbour.
    """
    words: list[str] = []
    size, share = 0, 0.0  # words of the window before, and its share
    for text, own_share in zip(texts, shares, strict=True):
        new = text.split()
        if not words or not new:
            words += new
        else:
            here = min(len(words), math.ceil(1.5 * share * size) + 2)
            there = min(len(new), math.ceil(1.5 * own_share * len(new)) + 2)
            tail, head = [_key(w) for w in words[len(words) - here :]], [_key(w) for w in new[:there]]
            match = difflib.SequenceMatcher(None, tail, head, autojunk=False).find_longest_match()
            if match.size >= 2 or (match.size and match.size == min(here, there)):
                keep, skip = len(words) - here + match.a + match.size // 2, match.b + match.size // 2
            else:
                keep, skip = len(words) - round(share * size / 2), round(own_share * len(new) / 2)
            words = words[:keep] + new[skip:]
        if new:
            size, share = len(new), own_share
    return " ".join(words)


def _key(word: str) -> str:
    """What is compared of a word: case and punctuation differ at the edges of a window."""
    return re.sub(r"\W", "", word.lower()) or word


def speech_spans(wav: torch.Tensor, window: int) -> list[tuple[int, int]]:
    """Cut a recording [time] at pauses into pieces of at most `window` samples, long silence left out."""
    spans: list[tuple[int, int]] = []
    for start, end in voice_activity(wav):
        if spans and end - spans[-1][0] <= window and start - spans[-1][1] <= 2 * SAMPLE_RATE:
            spans[-1] = (spans[-1][0], end)
            continue
        while end - start > window:  # speech without a pause: cut where it is quietest in the last third
            cut = start + quietest(wav[start + 2 * window // 3 : start + window].cpu()) + 2 * window // 3
            spans.append((start, cut))
            start = cut
        spans.append((start, end))
    return spans


def voice_activity(wav: torch.Tensor) -> list[tuple[int, int]]:
    """Return start and end of stretches of speech in samples, by Silero's detector where it is installed."""
    detector = _silero()
    if detector is None:
        return loud_spans(wav.cpu())
    from silero_vad import get_speech_timestamps

    found = get_speech_timestamps(wav.cpu(), detector, sampling_rate=SAMPLE_RATE, speech_pad_ms=200)
    return [(span["start"], span["end"]) for span in found]


@functools.cache
def _silero() -> Any:
    """Return Silero's detector; None where it is not installed."""
    try:
        from silero_vad import load_silero_vad
    except ImportError:
        return None
    return load_silero_vad()


def loud_spans(
    wav: torch.Tensor, pad: int = SAMPLE_RATE // 5, shortest_pause: int = SAMPLE_RATE // 2
) -> list[tuple[int, int]]:
    """Return stretches of [time] above a quarter of the way from noise floor to speech (10th, 95th percentile of the level)."""
    level = _levels(wav)
    low, high = level.quantile(0.1), level.quantile(0.95)
    spans: list[tuple[int, int]] = []
    for frame in (level > low + (high - low) / 4).nonzero().flatten().tolist():
        start, end = max(0, frame * FRAME - pad), min(len(wav), (frame + 1) * FRAME + pad)
        if spans and start - spans[-1][1] <= shortest_pause:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def quietest(wav: torch.Tensor) -> int:
    """Return the sample in the middle of the quietest 0.2 s of [time]."""
    level = _levels(wav)
    smooth = torch.nn.functional.avg_pool1d(level[None], min(10, len(level)), 1)[0]
    return (int(smooth.argmin()) + min(10, len(level)) // 2) * FRAME


def _levels(wav: torch.Tensor) -> torch.Tensor:
    """Level of every 20 ms in decibels, [frames]."""
    frames = wav[: len(wav) // FRAME * FRAME].reshape(-1, FRAME).double()
    return (10 * (frames.pow(2).mean(dim=1) + 1e-10).log10()).float()
