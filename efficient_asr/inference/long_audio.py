"""Long audio with models that take a window: cut, transcribe, join. Works with every Transcriber that has a `window_s`.

- `pauses`, the default: pieces between pauses of speech, found by Silero's voice activity detector (package `silero-vad`) or,
  without it, by energy; pieces are as long as fits into a window, and long silence is left out.
- `overlap`: windows that overlap; neighbouring texts are joined in the middle of the longest run of words that both end and
  beginning share.
- `sequential`: Whisper's own algorithm, each window starting where the last timestamp of the one before ended. Slower,
  since windows cannot be batched, and Whisper only.

Whatever the method, a piece that loops or fails Whisper's thresholds is decoded again at higher temperatures, by itself, and the
segments are those of the joined text: in order, without overlap, and their texts joined are the text. Audio that fits into the
window passes through untouched.
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
from efficient_asr.utils.errors import UserError, did_you_mean

METHODS = ("overlap", "pauses", "sequential")
FRAME = SAMPLE_RATE // 50


class LongAudio(Transcriber):
    """A transcriber for audio of any length around one that takes a window.

    Arguments
    ---------
    transcriber : Transcriber
        With `window_s`.
    method : str
        `pauses`, `overlap` or `sequential`.
    batch_size : int
        Pieces of one recording that are transcribed together.
    overlap_s : float
        Seconds that neighbouring windows share with `overlap`; at most a third of a window.

    Raises
    ------
    UserError
        For another method, or one that the transcriber cannot.
    """

    def __init__(
        self, transcriber: Transcriber, method: str = "pauses", batch_size: int = 8, overlap_s: float = 5.0
    ) -> None:
        if method not in METHODS:
            raise UserError(f"long audio: '{method}' is not {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
        if method == "sequential" and not transcriber.is_sequential:
            raise UserError("long audio: only a plain Whisper transcribes sequentially; use pauses or overlap")
        self.transcriber, self.method, self.batch_size, self.overlap_s = transcriber, method, batch_size, overlap_s
        self.window = round(transcriber.window_s * SAMPLE_RATE)

    @property
    def model(self) -> Any:
        """The model of the transcriber inside; the transcriber itself where it has none."""
        return self.transcriber if self.transcriber.model is None else self.transcriber.model

    @property
    def technique(self) -> str:
        """Technique of the transcriber inside."""
        return self.transcriber.technique

    @property
    def label(self) -> str:
        """Variant of the transcriber inside."""
        return self.transcriber.label

    @property
    def batched(self) -> bool:
        """Whether the transcriber inside computes several utterances together."""
        return self.transcriber.batched

    @property
    def takes_languages(self) -> bool:
        """Whether the transcriber inside is given the language of each utterance."""
        return self.transcriber.takes_languages

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that the transcriber inside knows."""
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
        """Those of the transcriber inside, and how long audio is cut."""
        long_audio = {"long_audio": self.method, "batch_size": self.batch_size, "overlap_s": self.overlap_s}
        return self.transcriber.settings | long_audio

    @property
    def shows_encoder(self) -> bool:
        """Whether the transcriber inside shows its encoder, for audio that fits into a window."""
        return self.transcriber.shows_encoder

    def encode(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Any:
        """First of two steps, for audio that fits into a window."""
        return self.transcriber.encode(wavs, wav_lens, hidden_states, languages)

    def decode(self, encoded: Any, languages: list[str | None] | None = None) -> list[Transcript]:
        """Second of two steps."""
        return self.transcriber.decode(encoded, languages)

    def encoder_shape(self) -> tuple[int, int, int]:
        """Return that of the transcriber inside."""
        return self.transcriber.encoder_shape()

    def to(self, device: str) -> LongAudio:
        """Move to a device and return itself."""
        self.transcriber.to(device)
        return self

    def parameters_count(self) -> int | None:
        """Number of weights."""
        return self.transcriber.parameters_count()

    def cost_key(self, transcript: Transcript) -> tuple | None:
        """Return that of the transcriber inside; its transcripts of long audio have none."""
        return self.transcriber.cost_key(transcript)

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Refuse what the transcriber inside refuses."""
        self.transcriber.check_rows(rows, split)

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the technique did over a whole benchmark."""
        return self.transcriber.summary(records)

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch], of any length.

        `languages` [batch] are for transcribers that take them.
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
        """Transcribe one recording [time], in a language where it is known for this one."""
        known = {"language": language} if language else {}
        transcriber = self.transcriber.for_long_audio()
        if self.method == "sequential":
            found = transcriber.transcribe_sequentially(wav, **known)
            segments = in_order(found.details["segments"], len(wav) / SAMPLE_RATE)
            return Transcript(_text_of(segments), found.details | {"segments": segments})
        overlap = min(round(self.overlap_s * SAMPLE_RATE), self.window // 3)
        if self.method == "overlap":
            spans = list(overlapping(len(wav), self.window, overlap))
        else:
            spans = speech_spans(wav, self.window)
        parts: list[Transcript] = []
        for i in range(0, len(spans), self.batch_size):
            pieces = [wav[start:end] for start, end in spans[i : i + self.batch_size]]
            each = {"languages": [language] * len(pieces)} if language else {}
            parts += transcriber.transcribe(*pad_wavs(pieces), **each)
        pieces = [_segments_of(part, start, end) for part, (start, end) in zip(parts, spans, strict=True)]
        if self.method == "overlap":
            texts = [_text_of(segments) for segments in pieces]
            kept = kept_words(texts, [overlap / (end - start) for start, end in spans])
            pieces = [
                _cut_to_seams(segments, words, *seams)
                for segments, words, seams in zip(pieces, kept, _seams(spans), strict=True)
            ]
        segments = in_order([segment for piece in pieces for segment in piece], len(wav) / SAMPLE_RATE)
        return Transcript(_text_of(segments), {"windows": len(spans), "long_audio": self.method, "segments": segments})


def _segments_of(part: Transcript, start: int, end: int) -> list[dict[str, Any]]:
    """Return the segments of a piece from `start` to `end` (samples) in the recording's time: its own, or one for all."""
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


def _text_of(segments: list[dict[str, Any]]) -> str:
    return " ".join(" ".join(segment["text"].split()) for segment in segments if segment["text"].strip())


def _seams(spans: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return from where to where (seconds) each window speaks: to the middle of what it shares with its neighbours."""
    middles = [(before[1] + after[0]) / 2 for before, after in itertools.pairwise(spans)]
    edges = [edge / SAMPLE_RATE for edge in ([spans[0][0], *middles, spans[-1][1]] if spans else [])]
    return list(itertools.pairwise(edges))


def _cut_to_seams(
    segments: list[dict[str, Any]], words: tuple[int, int], start_s: float, end_s: float
) -> list[dict[str, Any]]:
    """Keep of a window's segments the words from one number to another, and no time outside of its seams."""
    found, place = [], 0
    for segment in segments:
        own = segment["text"].split()
        text = " ".join(own[max(0, words[0] - place) : max(0, words[1] - place)])
        place += len(own)
        if text:
            # Words that one window keeps although their time is the other's stand at the seam.
            times = {key: min(max(segment[key], start_s), end_s) for key in ("start_s", "end_s")}
            found.append(segment | times | {"text": text})
    return found


def in_order(segments: list[dict[str, Any]], length_s: float) -> list[dict[str, Any]]:
    """Return segments none of which begins before the one in front of it has ended; those without text are left out."""
    found, end_s = [], 0.0
    for segment in segments:
        if not segment["text"].strip():
            continue
        start_s = min(max(segment["start_s"], end_s), length_s)
        end_s = min(max(segment["end_s"], start_s), length_s)
        found.append(segment | {"start_s": round(start_s, 3), "end_s": round(end_s, 3)})
    return found


def overlapping(samples: int, window: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of windows, each sharing `overlap` samples with the one before; the last may be shorter."""
    start = 0
    while True:
        yield start, min(samples, start + window)
        if start + window >= samples:
            return
        start += window - overlap


def join_overlapping(texts: list[str], shares: list[float]) -> str:
    """Join texts of windows whose ends and beginnings tell of the same audio; see `kept_words`."""
    kept = kept_words(texts, shares)
    return " ".join(word for text, (a, b) in zip(texts, kept, strict=True) for word in text.split()[a:b])


def kept_words(texts: list[str], shares: list[float]) -> list[tuple[int, int]]:
    """Return which words of each window belong to the joined text, where ends and beginnings tell of the same audio.

    Among the words that the overlap may hold (its share of the audio, half as much again, and two more), the longest run that
    both texts have is where they are joined, in its middle. Without a run of at least two words both are cut in the
    middle of the overlap.

    Arguments
    ---------
    texts : list of str
        In order.
    shares : list of float
        Which part of each window overlaps with one neighbour.

    Returns
    -------
    list of tuple of int
        Number of the first word, and of the one behind the last.
    """
    kept: list[tuple[int, int]] = []
    words: list[tuple[int, str]] = []  # of the joined text so far: window and word
    size, share = 0, 0.0  # words of the window before, and its share
    for window, (text, own_share) in enumerate(zip(texts, shares, strict=True)):
        new = text.split()
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
            for before, _ in words[max(0, keep) :]:  # each gives up its last word
                kept[before] = (kept[before][0], kept[before][1] - 1)
            words = words[: max(0, keep)]
        kept.append((skip, len(new)))
        words += [(window, word) for word in new[skip:]]
        if new:
            size, share = len(new), own_share
    return kept


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
