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
from efficient_asr.evaluation import long_audio
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
    """Says in which quarter seconds of the recording a window lies, by reading them off the samples."""

    window_s, batched = 3.0, True

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        lengths = (wav_lens * wavs.shape[1]).round().long()
        assert int(lengths.max()) <= 3 * RATE
        return [
            Transcript(" ".join(f"w{int(s)}" for s in wav[: n : RATE // 4]))
            for wav, n in zip(wavs, lengths, strict=True)
        ]


def seconds(count: float) -> torch.Tensor:
    return torch.arange(round(count * RATE)).div(RATE // 4, rounding_mode="floor").float()


@pytest.mark.parametrize("samples", [31, 45, 55, 60, 100, 1001])
def test_windows_cover_everything_and_overlap(samples: int) -> None:
    spans = list(overlapping(samples, 30, 5))
    assert spans[0][0] == 0 and spans[-1][1] == samples and all(0 < end - start <= 30 for start, end in spans)
    assert all(before[1] - after[0] == 5 for before, after in itertools.pairwise(spans))
    assert len(spans) == -(-(samples - 5) // 25)


def test_texts_are_joined_where_they_agree() -> None:
    assert join_overlapping(["a b c d e f", "D, e f g h"], [0.5, 0.6]) == "a b c d e f g h"
    assert join_overlapping(["the cat sat on tbe", "hat sat on the mat"], [0.6, 0.6]) == "the cat sat on the mat"
    assert join_overlapping(["", "a b", ""], [0.2] * 3) == "a b" and join_overlapping([], []) == ""


def test_without_agreement_the_overlap_is_cut_in_its_middle() -> None:
    assert join_overlapping(["a b c d", "w x y z"], [0.5, 0.5]) == "a b c x y z"


def test_one_common_word_joins_nothing() -> None:
    first = "one two three four the five six seven eight nine ten eleven twelve"
    second = "alpha beta gamma delta eta the theta iota"
    joined = join_overlapping([first, second], [0.1, 0.1]).split()
    assert len(joined) >= 19 and joined[:11] == first.split()[:11] and joined[-6:] == second.split()[-6:]


@pytest.mark.parametrize(("length_s", "words_per_s"), [(31, 2.8), (33, 3.2), (90, 4.0)])
def test_joined_texts_are_as_long_as_the_speech(length_s: int, words_per_s: float) -> None:
    said = [f"w{i}" for i in range(int(length_s * words_per_s))]
    spans = list(overlapping(length_s * 100, 3000, 500))
    heard = [" ".join(said[round(a / 100 * words_per_s) : round(b / 100 * words_per_s)]) for a, b in spans]
    assert join_overlapping(heard, [500 / (b - a) for a, b in spans]).split() == said


@pytest.mark.parametrize("length", [3.5, 7.0, 20.0])
def test_every_word_is_heard_once(length: float) -> None:
    (found,) = LongAudio(Counter(), "overlap").transcribe(seconds(length)[None], torch.ones(1))
    words = [int(word[1:]) for word in found.text.split()]
    assert words == list(range(int(4 * length)))
    assert found.details["long_audio"] == "overlap" and found.details["windows"] == len(found.details["segments"])


def test_short_audio_passes_untouched() -> None:
    batch = pad_wavs([seconds(2.0), seconds(9.0), seconds(3.0)])
    found = LongAudio(Counter()).transcribe(*batch)
    assert found[0].text.split()[-1] == "w7" and found[2].text.split()[-1] == "w11"
    assert "segments" not in found[0].details and found[1].text.split()[-1] == "w35"


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
    long_audio._silero.cache_clear()
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


@pytest.mark.parametrize("method", ["overlap", "pauses"])
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


def test_a_model_without_timestamps_refuses_what_needs_them(tiny_whispers: dict[str, str]) -> None:
    wav = torch.randn(1, 3 * RATE)
    for options in ({"long_audio": "sequential"}, {"timestamps": True}):
        with pytest.raises(UserError, match="no tokens for them"):
            load_transcriber(tiny_whispers["small"], language="en", **options).transcribe(wav, torch.ones(1))


def test_the_language_reaches_the_whisper_inside(tiny_whispers: dict[str, str]) -> None:
    transcriber = load_transcriber(tiny_whispers["small"])
    transcriber.language = "en"
    assert transcriber.transcriber.language == "en"
    assert "language" not in transcriber.transcribe(torch.randn(1, RATE), torch.ones(1))[0].details


@pytest.mark.real
@pytest.mark.parametrize("method", ["overlap", "pauses", "sequential"])
def test_real_long_speech(method: str, real_data: Any, real_models: Any) -> None:
    from efficient_asr.data import Rows, load_audio, read_manifest
    from efficient_asr.evaluation.evaluator import Benchmark, evaluate

    rows = [row for row in read_manifest(real_data / "longform" / "manifest.jsonl") if row["id"].startswith("LJ001")]
    assert rows and len(load_audio(rows[0]["audio"])) > 45 * RATE
    transcriber = load_transcriber(str(real_models / "whisper-tiny"), language="en", long_audio=method)
    result = evaluate(transcriber, Benchmark("x", "y", Rows.of(rows), "whisper"), measure_macs=False, repeats=0)
    assert result.wer_percent < 12
