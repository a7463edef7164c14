"""Long audio for models with a fixed window: split, transcribe, join. Works with every Transcriber that has a `window_s`.

- `pauses`, the default: split at pauses in speech, detected by Silero's voice activity detector (package `silero-vad`) or,
  without it, by energy. Pieces are as long as the window allows, and long silence is dropped.
- `overlap`: overlapping windows. Neighbouring texts are joined in the middle of the longest run of words shared by the end of
  one and the beginning of the next.
- `sequential`: Whisper's own algorithm. Each window starts at the last timestamp of the previous one. Slower, since windows
  cannot be batched, and for Whisper only.

With every method, a piece that loops or fails Whisper's thresholds is decoded again on its own at higher temperatures. Segments
are returned in order and without overlap, and their texts joined give the text of the transcript. Audio that fits into the window
is transcribed directly. A language that is not given is detected in the first piece in which something was said, as in Whisper's
own algorithm, and holds for the rest of the recording.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE, Row, absolute_lengths, check_wavs, pad_wavs
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.text.normalise import spaced, words_of
from efficient_asr.utils.errors import UserError, did_you_mean

METHODS = ("overlap", "pauses", "sequential")
FRAME = SAMPLE_RATE // 50


class LongAudio(Transcriber):
    """Wrap a transcriber with a fixed window to transcribe audio of any length.

    Arguments
    ---------
    transcriber : Transcriber
        The wrapped transcriber; must define `window_s`.
    method : str
        `pauses`, `overlap` or `sequential`.
    batch_size : int
        Batch size for the pieces of one recording.
    overlap_s : float
        Overlap of neighbouring windows in seconds, for `overlap`; at most a third of the window.

    Raises
    ------
    UserError
        If the method is unknown or the transcriber does not support it.
    """

    def __init__(
        self, transcriber: Transcriber, method: str = "pauses", batch_size: int = 8, overlap_s: float = 5.0
    ) -> None:
        if method not in METHODS:
            raise UserError(
                f"long audio: invalid method '{method}'; use {', '.join(METHODS)}.{did_you_mean(method, METHODS)}"
            )
        if not isinstance(overlap_s, (int, float)) or not 0 <= overlap_s < math.inf:
            raise UserError(f"overlap_s: {overlap_s!r} is not a number of seconds, 0 or more")
        if method == "sequential":
            transcriber.check_sequential()
        self.transcriber, self.method, self.batch_size, self.overlap_s = transcriber, method, batch_size, overlap_s
        self.window = round(transcriber.window_s * SAMPLE_RATE)

    @property
    def model(self) -> Any:
        """Model of the wrapped transcriber; the transcriber itself if it has none."""
        return self.transcriber if self.transcriber.model is None else self.transcriber.model

    @property
    def piece_s(self) -> float | None:
        """Window of the wrapped transcriber."""
        return self.transcriber.window_s

    @property
    def changes(self) -> list[str]:
        """What the wrapped transcriber computes differently from its stored models."""
        return self.transcriber.changes

    @property
    def counts_macs(self) -> bool:
        """Whether the MACs of the wrapped transcriber can be counted."""
        return self.transcriber.counts_macs

    @property
    def thop_counts(self) -> bool:
        """Whether thop knows all layers of the wrapped transcriber."""
        return self.transcriber.thop_counts

    @property
    def technique(self) -> str:
        """Technique of the wrapped transcriber."""
        return self.transcriber.technique

    @property
    def label(self) -> str:
        """Variant of the wrapped transcriber."""
        return self.transcriber.label

    @property
    def batched(self) -> bool:
        """Whether the wrapped transcriber can process several utterances in one batch."""
        return self.transcriber.batched

    @property
    def takes_languages(self) -> bool:
        """Whether the wrapped transcriber must be given the language of each utterance."""
        return self.transcriber.takes_languages

    @property
    def normaliser(self) -> str | None:
        """Default normaliser for scoring the wrapped transcriber."""
        return self.transcriber.normaliser

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that the wrapped transcriber supports."""
        return self.transcriber.languages

    @property
    def language(self) -> str | None:
        """Language of the audio."""
        return self.transcriber.language

    @language.setter
    def language(self, language: str | None) -> None:
        self.transcriber.language = language

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the wrapped transcriber, and of the method for long audio."""
        long_audio = {"long_audio": self.method, "batch_size": self.batch_size, "overlap_s": self.overlap_s}
        return self.transcriber.settings | long_audio

    @property
    def shows_encoder(self) -> bool:
        """Whether the wrapped transcriber exposes its encoder, for audio that fits into the window."""
        return self.transcriber.shows_encoder

    def encode(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor | None = None,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Any:
        """Run the encoder (first of two steps), for audio that fits into the window."""
        return self.transcriber.encode(wavs, wav_lens, hidden_states, languages)

    def decode(self, encoded: Any, languages: list[str | None] | None = None) -> list[Transcript]:
        """Decode the output of `encode` to text (second of two steps)."""
        return self.transcriber.decode(encoded, languages)

    def for_long_audio(self) -> LongAudio:
        """Return a transcriber whose short audio is decoded with the safeguards for the pieces of long audio."""
        return LongAudio(self.transcriber.for_long_audio(), self.method, self.batch_size, self.overlap_s)

    def with_times(self) -> LongAudio | None:
        """Return a transcriber whose transcripts have timed segments; None if the wrapped one cannot predict times."""
        timed = self.transcriber.with_times()
        return None if timed is None else LongAudio(timed, self.method, self.batch_size, self.overlap_s)

    def encoder_shape(self) -> tuple[int, int, int]:
        """Return the encoder shape of the wrapped transcriber."""
        return self.transcriber.encoder_shape()

    def to(self, device: str) -> LongAudio:
        """Move to a device and return self."""
        self.transcriber.to(device)
        return self

    def parameters_count(self) -> int | None:
        """Number of parameters."""
        return self.transcriber.parameters_count()

    def cost_key(self, transcript: Transcript) -> tuple | None:
        """Return the cost key of the wrapped transcriber; transcripts of long audio have none."""
        return self.transcriber.cost_key(transcript)

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Reject utterances that the wrapped transcriber rejects."""
        self.transcriber.check_rows(rows, split)

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Summarise the technique's decisions over a whole benchmark."""
        return self.transcriber.summary(records)

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch], of any length.

        `languages` [batch] are used only by transcribers with `takes_languages`.
        """
        wavs, wav_lens = check_wavs(wavs, wav_lens)
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
        """Transcribe one recording [time], in the given language if not None."""
        known = {"language": language} if language else {}
        transcriber = self.transcriber.for_long_audio()
        if self.method == "sequential":
            found = transcriber.transcribe_sequentially(wav, **known)
            segments = in_order(found.details["segments"], len(wav) / SAMPLE_RATE)
            return Transcript(text_of(segments), found.details | {"segments": segments})
        overlap = min(round(self.overlap_s * SAMPLE_RATE), self.window // 3)
        if self.method == "overlap":
            spans = list(overlapping(len(wav), self.window, overlap))
        else:
            spans = speech_spans(wav, self.window)
        pieces = list(iterate_spans(transcriber, wav, spans, self.batch_size, language))
        if self.method == "overlap":
            texts = [text_of(segments) for segments in pieces]
            kept = kept_words(texts, [overlap / (end - start) for start, end in spans])
            pieces = [
                _cut_to_seams(segments, words, *seams)
                for segments, words, seams in zip(pieces, kept, _seams(spans), strict=True)
            ]
        segments = in_order([segment for piece in pieces for segment in piece], len(wav) / SAMPLE_RATE)
        return Transcript(text_of(segments), {"windows": len(spans), "long_audio": self.method, "segments": segments})


def iterate_spans(
    transcriber: Transcriber,
    wav: torch.Tensor,
    spans: list[tuple[int, int]],
    batch_size: int,
    language: str | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Transcribe parts of a recording [time], given by start and end in samples; yield the segments of each as soon as possible.

    Of several parts, `transcriber` must be one of this recording alone (`for_long_audio`): a language that is not given is
    detected in one part after the other until something was said, and then set.
    """
    detected, place = None, 0
    while place < len(spans):
        detects = len(spans) > 1 and transcriber.languages and not (language or transcriber.language)
        batch = spans[place : place + (1 if detects else batch_size)]
        each = {"languages": [language] * len(batch)} if language else {}
        parts = transcriber.transcribe(*pad_wavs([wav[start:end] for start, end in batch]), **each)
        for part, (start, end) in zip(parts, batch, strict=True):
            if detects and part.text:
                transcriber.language = detected = part.details.get("language")
            known = {"language": detected} if detected else {}
            yield _segments_of(Transcript(part.text, known | part.details), start, end)
        place += len(batch)


def _segments_of(part: Transcript, start: int, end: int) -> list[dict[str, Any]]:
    """Return a piece's segments (or one for all of it) in the recording's time; the piece is `start` to `end` in samples."""
    start_s, end_s = start / SAMPLE_RATE, end / SAMPLE_RATE
    rest = {key: value for key, value in part.details.items() if key != "segments"}
    inner = part.details.get("segments")
    if not inner:
        return [{"start_s": start_s, "end_s": end_s, "text": part.text} | rest]
    found = []
    for segment in inner:
        times = {key: min(end_s, start_s + segment[key]) for key in ("start_s", "end_s")}
        found.append(rest | segment | times)
    return found


def text_of(segments: list[dict[str, Any]]) -> str:
    """Return the texts of segments, joined: with spaces, but in scripts that have none."""
    return "".join(spaced(" ".join(segment["text"].split())) for segment in segments).strip()


def _seams(spans: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return the start and end (seconds) of each window's own part, bounded by the middle of each overlap."""
    middles = [(before[1] + after[0]) / 2 for before, after in itertools.pairwise(spans)]
    edges = [edge / SAMPLE_RATE for edge in ([spans[0][0], *middles, spans[-1][1]] if spans else [])]
    return list(itertools.pairwise(edges))


def _cut_to_seams(
    segments: list[dict[str, Any]], words: tuple[int, int], start_s: float, end_s: float
) -> list[dict[str, Any]]:
    """Keep a window's words (`words_of`) in the range `words` (first, end), and clamp segment times to `start_s` and `end_s`."""
    found, place = [], 0
    for segment in segments:
        own = words_of(segment["text"])
        text = "".join(own[max(0, words[0] - place) : max(0, words[1] - place)]).strip()
        place += len(own)
        if text:
            # A word kept by this window but timed in its neighbour's part is placed at the boundary.
            times = {key: min(max(segment[key], start_s), end_s) for key in ("start_s", "end_s")}
            found.append(segment | times | {"text": text})
    return found


def in_order(segments: list[dict[str, Any]], length_s: float, end_s: float = 0.0) -> list[dict[str, Any]]:
    """Return segments without empty ones, adjusted so that none begins before `end_s` or before the previous one ends."""
    found = []
    for segment in segments:
        if not segment["text"].strip():
            continue
        start_s = min(max(segment["start_s"], end_s), length_s)
        end_s = min(max(segment["end_s"], start_s), length_s)
        found.append(segment | {"start_s": round(start_s, 3), "end_s": round(end_s, 3)})
    return found


def overlapping(samples: int, window: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of windows, each overlapping the previous one by `overlap` samples; the last may be shorter."""
    start = 0
    while True:
        yield start, min(samples, start + window)
        if start + window >= samples:
            return
        start += window - overlap


def join_overlapping(texts: list[str], shares: list[float]) -> str:
    """Join the texts of overlapping windows; see `kept_words`."""
    kept = kept_words(texts, shares)
    parts = ["".join(words_of(text)[a:b]) for text, (a, b) in zip(texts, kept, strict=True)]
    return "".join(spaced(part) for part in parts).strip()


def kept_words(texts: list[str], shares: list[float]) -> list[tuple[int, int]]:
    """Return the words of each overlapping window that belong to the joined text.

    The overlap is assumed to hold at most 1.5 times its share of the words, plus two. Within these words, the texts are joined
    in the middle of their longest common run. Without a common run of at least two words, both are cut in the middle of the
    overlap.

    Arguments
    ---------
    texts : list of str
        Texts of the windows, in order.
    shares : list of float
        Fraction of each window that overlaps with one neighbour.

    Returns
    -------
    list of tuple of int
        For each window, the index of the first word and the index after the last.
    """
    kept: list[tuple[int, int]] = []
    words: list[tuple[int, str]] = []  # joined text so far: window index and word
    size, share = 0, 0.0  # word count and share of the previous window
    for window, (text, own_share) in enumerate(zip(texts, shares, strict=True)):
        new = words_of(text)
        skip = 0
        if words and new:
            here = min(len(words), math.ceil(1.5 * share * size) + 2)
            there = min(len(new), math.ceil(1.5 * own_share * len(new)) + 2)
            tail, head = [_key(w) for _, w in words[len(words) - here :]], [_key(w) for w in new[:there]]
            match = difflib.SequenceMatcher(None, tail, head, autojunk=False).find_longest_match()
            if match.size >= 2 or (match.size and match.size == min(here, there)):
                keep, skip = len(words) - here + match.a + match.size // 2, match.b + match.size // 2
            else:
                keep, skip = len(words) - round(share * size / 2), round(own_share * len(new) / 2)
            for before, _ in words[max(0, keep) :]:  # drop the last word of its window
                kept[before] = (kept[before][0], kept[before][1] - 1)
            words = words[: max(0, keep)]
        kept.append((skip, len(new)))
        words += [(window, word) for word in new[skip:]]
        if new:
            size, share = len(new), own_share
    return kept


def _key(word: str) -> str:
    """Return a word for comparison, without case and punctuation, which vary at window edges."""
    return re.sub(r"\W", "", word.lower()) or word


def speech_spans(wav: torch.Tensor, window: int, pause_s: float = 2.0) -> list[tuple[int, int]]:
    """Split a recording [time] at pauses into pieces of at most `window` samples; pauses longer than `pause_s` are dropped."""
    spans: list[tuple[int, int]] = []
    for start, end in voice_activity(wav):
        if spans and end - spans[-1][0] <= window and start - spans[-1][1] <= pause_s * SAMPLE_RATE:
            spans[-1] = (spans[-1][0], end)
            continue
        while end - start > window:  # speech without a pause: cut at the quietest point of the last third
            cut = start + quietest(wav[start + 2 * window // 3 : start + window].cpu()) + 2 * window // 3
            spans.append((start, cut))
            start = cut
        spans.append((start, end))
    return spans


def voice_activity(wav: torch.Tensor) -> list[tuple[int, int]]:
    """Return start and end of speech segments in samples, using Silero's detector if installed, energy otherwise."""
    detector = _silero()
    if detector is None:
        return loud_spans(wav.cpu())
    from silero_vad import get_speech_timestamps

    found = get_speech_timestamps(wav.cpu(), detector, sampling_rate=SAMPLE_RATE, speech_pad_ms=200)
    return [(span["start"], span["end"]) for span in found]


@functools.cache
def _silero() -> Any:
    """Return Silero's detector, or None if it is not installed."""
    try:
        from silero_vad import load_silero_vad
    except ImportError:
        return None
    return load_silero_vad()


def loud_spans(
    wav: torch.Tensor, pad: int = SAMPLE_RATE // 5, shortest_pause: int = SAMPLE_RATE // 2
) -> list[tuple[int, int]]:
    """Return spans of [time] louder than floor + (speech - floor) / 4 (10th and 95th percentile of the level)."""
    level = _levels(wav)
    if not len(level):
        return []
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
    """Return the index of the middle sample of the quietest 0.2 s of [time]."""
    level = _levels(wav)
    smooth = torch.nn.functional.avg_pool1d(level[None], min(10, len(level)), 1)[0]
    return (int(smooth.argmin()) + min(10, len(level)) // 2) * FRAME


def _levels(wav: torch.Tensor) -> torch.Tensor:
    """Return the level of each 20 ms frame in decibels, [frames]."""
    frames = wav[: len(wav) // FRAME * FRAME].reshape(-1, FRAME).double()
    return (10 * (frames.pow(2).mean(dim=1) + 1e-10).log10()).float()
