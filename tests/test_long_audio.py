"""Audio beyond the window: cutting, joining, and that short audio passes untouched."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.data import pad_wavs
from efficient_asr.errors import UserError
from efficient_asr.evaluation.long_audio import (
    LongAudio,
    join_overlapping,
    loud_spans,
    overlapping,
    quietest,
    speech_spans,
)
from efficient_asr.evaluation.transcript import Transcript

RATE = 16000


class Counter:
    """Says in which seconds of the recording a window lies, by reading them off the samples (sample = second)."""

    window_s, batched = 3.0, True

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        lengths = (wav_lens * wavs.shape[1]).round().long()
        assert int(lengths.max()) <= 3 * RATE
        return [Transcript(" ".join(f"w{int(s)}" for s in wav[:n:RATE])) for wav, n in zip(wavs, lengths, strict=True)]


def seconds(count: float) -> torch.Tensor:
    return torch.arange(round(count * RATE)).div(RATE, rounding_mode="floor").float()


@pytest.mark.parametrize("samples", [31, 45, 60, 100, 1001])
def test_windows_cover_everything_and_overlap(samples: int) -> None:
    spans = list(overlapping(samples, 30, 5))
    assert spans[0][0] == 0 and spans[-1][1] == samples and all(0 < end - start <= 30 for start, end in spans)
    assert all(before[1] - after[0] >= 5 for before, after in itertools.pairwise(spans))


def test_texts_are_joined_where_they_agree() -> None:
    assert join_overlapping(["a b c d e f", "D, e f g h"]) == "a b c d e f g h"
    assert join_overlapping(["the cat sat on tbe", "hat sat on the mat"]) == "the cat sat on the mat"
    assert join_overlapping(["one two", "three four"]) == "one two three four"
    assert join_overlapping(["", "a b", ""]) == "a b" and join_overlapping([]) == ""


@pytest.mark.parametrize("length", [3.5, 7.0, 20.0])
def test_every_word_is_heard_once(length: float) -> None:
    (found,) = LongAudio(Counter(), "overlap").transcribe(seconds(length)[None], torch.ones(1))
    words = [int(word[1:]) for word in found.text.split()]
    assert words == sorted(set(words)) and set(words) >= set(range(int(length)))
    assert found.details["long_audio"] == "overlap" and found.details["windows"] == len(found.details["segments"])


def test_short_audio_passes_untouched() -> None:
    batch = pad_wavs([seconds(2.0), seconds(9.0), seconds(3.0)])
    found = LongAudio(Counter()).transcribe(*batch)
    assert found[0].text == "w0 w1" and found[2].text == "w0 w1 w2" and "segments" not in found[0].details
    assert found[1].text.split()[-1] == "w8"


def speech_with_pauses() -> torch.Tensor:
    """Speech-like noise at 1 to 3 s and 6 to 7 s of 8 s."""
    rng = np.random.default_rng(0)
    wav = 0.001 * rng.standard_normal(8 * RATE)
    for start, end in ((1, 3), (6, 7)):
        wav[start * RATE : end * RATE] += 0.3 * rng.standard_normal((end - start) * RATE)
    return torch.from_numpy(wav).float()


def test_pauses_are_found_by_energy() -> None:
    spans = [(round(a / RATE, 1), round(b / RATE, 1)) for a, b in loud_spans(speech_with_pauses())]
    assert spans == [(0.8, 3.2), (5.8, 7.2)]


def test_quietest_place() -> None:
    wav = torch.ones(2 * RATE)
    wav[RATE : RATE + RATE // 4] = 0
    assert RATE <= quietest(wav) <= RATE + RATE // 4


@pytest.fixture
def without_silero(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "silero_vad":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_pieces_fit_and_leave_silence_out(without_silero: None) -> None:
    wav = speech_with_pauses()
    pieces = speech_spans(wav, 4 * RATE)
    assert all(end - start <= 4 * RATE for start, end in pieces) and len(pieces) == 2
    assert sum(end - start for start, end in pieces) < 4.5 * RATE
    endless = torch.from_numpy(np.random.default_rng(1).standard_normal(10 * RATE)).float()
    cut = speech_spans(endless, 3 * RATE)
    assert all(0 < end - start <= 3 * RATE for start, end in cut)
    assert [end for _, end in cut[:-1]] == [start for start, _ in cut[1:]]  # nothing of speech is lost


def test_silence_has_an_empty_text(without_silero: None) -> None:
    (found,) = LongAudio(Counter(), "pauses").transcribe(torch.zeros(1, 5 * RATE), torch.ones(1))
    assert found.text == "" and found.details["windows"] == 0


@pytest.mark.parametrize("method", ["overlap", "pauses", "sequential"])
def test_whisper_takes_long_audio(method: str, tiny_whispers: dict[str, str], without_silero: None) -> None:
    transcriber = load_transcriber(tiny_whispers["large"], language="en", long_audio=method)
    wav = speech_with_pauses()
    found = transcriber.transcribe(*pad_wavs([wav, wav[: 2 * RATE]]))
    assert found[0].details["long_audio"] == method and "long_audio" not in found[1].details
    assert transcriber.batched and transcriber.parameters_count() > 0


def test_mistakes_are_explained(tiny_whispers: dict[str, str]) -> None:
    with pytest.raises(UserError, match="only a plain Whisper"):
        LongAudio(Counter(), "sequential")
    refusing = load_transcriber(tiny_whispers["small"], language="en", long_audio=None)
    with pytest.raises(UserError, match="this Whisper takes 2 s, split it"):
        refusing.transcribe(torch.randn(1, 3 * RATE), torch.ones(1))
