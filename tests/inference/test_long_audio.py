"""Audio beyond the window: cutting, joining, and that short audio passes untouched."""

from __future__ import annotations

import builtins
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.data import pad_wavs
from efficient_asr.inference import long_audio
from efficient_asr.inference.long_audio import (
    LongAudio,
    join_overlapping,
    loud_spans,
    overlapping,
    quietest,
    speech_spans,
)
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.whisper.decoding import WHISPER_TEMPERATURES, loop_start, without_loop
from efficient_asr.models.whisper.search import decode
from efficient_asr.models.whisper.timestamps import TimestampRules, split_segments
from efficient_asr.utils.errors import UserError

RATE = 16000


class Counter(Transcriber):
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


@pytest.mark.parametrize(
    ("said", "second"),
    [("今天天气很好我们去公园散步然后回家吃饭", "公园散步然后回家吃饭再看一会儿书"), ("กขคงจฉชซฌญฎฏ", "ชซฌญฎฏฐฑฒณดต")],
)
def test_scripts_without_spaces_are_joined_by_their_characters(said: str, second: str) -> None:
    common = next(i for i in range(len(said)) if second.startswith(said[i:]))
    share = (len(said) - common) / len(said)
    assert join_overlapping([said, second], [share, share]) == said[:common] + second
    assert join_overlapping(["他说 hello world", "hello world 然后"], [0.6, 0.6]) == "他说 hello world 然后"


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


class Signs(Transcriber):
    """Writes a sign of a script without spaces for every quarter second."""

    window_s, batched = 3.0, True

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        lengths = (wav_lens * wavs.shape[1]).round().long()
        return [
            Transcript("".join(chr(0x4E00 + int(s)) for s in wav[: n : RATE // 4]))
            for wav, n in zip(wavs, lengths, strict=True)
        ]


@pytest.mark.parametrize("length", [3.5, 7.0, 20.0])
def test_every_sign_is_written_once(length: float) -> None:
    (found,) = LongAudio(Signs(), "overlap").transcribe(seconds(length)[None], torch.ones(1))
    assert found.text == "".join(chr(0x4E00 + i) for i in range(int(4 * length)))
    assert "".join(segment["text"] for segment in found.details["segments"]) == found.text


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
    assert transcriber.batched and transcriber.parameters_count() > 0 and transcriber.to("cpu") is transcriber


def test_mistakes_are_explained(tiny_whispers: dict[str, str]) -> None:
    with pytest.raises(UserError, match="only a plain Whisper"):
        LongAudio(Counter(), "sequential")
    for options, message in (
        ({"encoder_padding": 0.1}, "encodes whole windows"), ({"encoder_padding": "silence_cache"}, "encodes whole windows"),
        ({"suppress": False}, "suppresses what"),
        ({"assistant": tiny_whispers["small"]}, "leave out the assistant"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_transcriber(tiny_whispers["small"], language="en", long_audio="sequential", **options)
    for options, message in (
        ({"temperatures": 0.2}, "temperatures: expected a list"), ({"temperatures": ["a"]}, "expected a list of numbers"),
        ({"max_tokens_per_s": "abc"}, "max_tokens_per_s: expected a number"), ({"num_beams": True}, "expected a number"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_transcriber(tiny_whispers["small"], language="en", **options)
    for overlap_s in (-5.0, float("nan"), "5"):
        with pytest.raises(UserError, match=r"overlap_s: .* is not a number of seconds, 0 or more"):
            LongAudio(Counter(), "overlap", overlap_s=overlap_s)
    english = load_transcriber(tiny_whispers["small"], language="en", task="translate", long_audio=None)
    english.model.labels.languages = {}
    with pytest.raises(UserError, match="is English-only"):
        english.check_sequential()
    refusing = load_transcriber(tiny_whispers["small"], language="en", long_audio=None)
    with pytest.raises(UserError, match="this Whisper takes at most 2 s; split the audio"):
        refusing.transcribe(torch.randn(1, 3 * RATE), torch.ones(1))
    window = torch.randn(1, 2 * RATE)  # a duration of 2.0 s in a manifest may be rounded
    more = torch.nn.functional.pad(window, (0, 100), value=0.5)
    assert refusing.transcribe(more, torch.ones(1)) == refusing.transcribe(window, torch.ones(1))
    with pytest.raises(UserError, match="split the audio"):
        refusing.transcribe(torch.randn(1, 2 * RATE + 160), torch.ones(1))


def test_a_model_without_timestamps_refuses_what_needs_them(tiny_whispers: dict[str, str]) -> None:
    wav = torch.randn(1, 3 * RATE)
    for options in ({"long_audio": "sequential"}, {"timestamps": True}):
        with pytest.raises(UserError, match="no timestamp tokens"):
            load_transcriber(tiny_whispers["small"], language="en", **options).transcribe(wav, torch.ones(1))


def test_the_language_reaches_the_whisper_inside(tiny_whispers: dict[str, str]) -> None:
    transcriber = load_transcriber(tiny_whispers["small"])
    transcriber.language = "en"
    assert transcriber.transcriber.language == "en"
    assert "language" not in transcriber.transcribe(torch.randn(1, RATE), torch.ones(1))[0].details


class Polyglot(Counter):
    """Hears English in samples up to 20, then German, and nothing in a piece that begins with 0."""

    languages = ("en", "de")

    def __init__(self) -> None:
        self.asked: list[int] = []

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list[str] | None = None
    ) -> list[Transcript]:
        self.asked.append(len(wavs))
        found = []
        for row, wav in enumerate(wavs):
            given = languages[row] if languages else self.language
            heard = given or ("de" if wav[0] > 20 else "en")
            details = {} if given else {"language": heard}
            found.append(Transcript("" if wav[0] == 0 else f"{heard}{int(wav[0])}", details))
        return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_language_of_a_recording_is_detected_once_where_something_is_said(batch_size: int) -> None:
    model = Polyglot()
    transcriber = LongAudio(model, "overlap", batch_size, overlap_s=0.0)
    (found,) = transcriber.transcribe(seconds(15.0)[None], torch.ones(1))
    assert found.text == "en12 en24 en36 en48"
    assert [segment["language"] for segment in found.details["segments"]] == ["en"] * 4
    assert model.asked == [1, 1, *([1, 1, 1] if batch_size == 1 else [3])]
    assert model.language is None and transcriber.transcribe(seconds(1.0)[None] + 40, torch.ones(1))[0].text == "de40"
    (given,) = transcriber.transcribe(seconds(15.0)[None], torch.ones(1), languages=["de"])
    assert given.text == "de12 de24 de36 de48"


class Clock(Counter):
    """Counts like `Counter`, and bounds every word by timestamps of the window."""

    def __init__(self, per_segment: int = 3) -> None:
        self.per_segment = per_segment

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        found = super().transcribe(wavs, wav_lens)
        for transcript in found:
            words = transcript.text.split()
            transcript.details["segments"] = [
                {
                    "start_s": i / 4,
                    "end_s": (i + self.per_segment) / 4,
                    "text": " ".join(words[i : i + self.per_segment]),
                }
                for i in range(0, len(words), self.per_segment)
            ]
        return found


def assert_in_order(found: Transcript, length_s: float) -> None:
    segments = found.details["segments"]
    assert " ".join(segment["text"] for segment in segments) == found.text
    assert all(before["end_s"] <= after["start_s"] for before, after in itertools.pairwise(segments))
    assert all(0 <= segment["start_s"] <= segment["end_s"] <= length_s + 1e-3 for segment in segments)


@pytest.mark.parametrize("transcriber", [Counter(), Clock(), Clock(1)])
def test_fifty_lengths_lose_repeat_and_reorder_nothing(transcriber: Any) -> None:
    """The seams stand elsewhere in each; every quarter second is a word of its own."""
    for length in np.random.default_rng(0).uniform(3.1, 30.0, 50).round(2):
        (found,) = LongAudio(transcriber, "overlap").transcribe(seconds(float(length))[None], torch.ones(1))
        words = [int(word[1:]) for word in found.text.split()]
        assert words == list(range(math.ceil(4 * length - 1e-9))), length
        assert_in_order(found, float(length))
        for segment in found.details["segments"]:  # a word stands within a second of where it is said
            first = int(segment["text"].split()[0][1:]) / 4
            assert abs(segment["start_s"] - first) <= 1.0


def test_pauses_of_a_recording_with_known_seams(without_silero: None) -> None:
    """Words of 2 s between pauses of 1 s: no piece begins or ends within a word."""
    rng = np.random.default_rng(0)
    parts, edges = [], []
    for i in range(12):
        edges.append((3 * i + 0.5, 3 * i + 2.5))
        parts += [
            0.001 * rng.standard_normal(RATE // 2),
            0.3 * rng.standard_normal(2 * RATE),
            0.001 * rng.standard_normal(RATE // 2),
        ]
    wav = torch.from_numpy(np.concatenate(parts)).float()
    pieces = [(a / RATE, b / RATE) for a, b in speech_spans(wav, 8 * RATE)]
    for start, end in edges:
        assert sum(a <= start and end <= b for a, b in pieces) == 1, (start, end, pieces)


def test_a_loop_is_found_cut_and_left_alone_where_it_is_none() -> None:
    assert loop_start([1, 2, 3] + [7] * 30) == 4 and loop_start([1, 2, 3] + [7] * 20) is None
    assert loop_start([5, 6] * 20) == 2 and loop_start(list(range(100))) is None
    assert without_loop([1, 2, 3, *[7, 8, 9] * 10], range(0)) == [1, 2, 3, 7, 8, 9]
    timed = list(itertools.chain.from_iterable([100 + i, 7, 8] for i in range(20)))  # timestamps differ in every round
    assert without_loop(timed, range(100, 200)) == [100, 7, 8, 101]


def test_pieces_of_long_audio_fall_back_and_short_audio_does_not(tiny_whispers: dict[str, str]) -> None:
    plain = load_transcriber(tiny_whispers["large"], language="en")
    assert plain.transcriber.options.schedule == (0.0,) and plain.method == "pauses"
    pieces = plain.transcriber.for_long_audio()
    assert pieces.options.schedule == WHISPER_TEMPERATURES and pieces.options.cut_loops
    chosen = load_transcriber(tiny_whispers["large"], language="en", temperatures=[0.0]).transcriber.for_long_audio()
    assert chosen.options.schedule == (0.0,) and chosen.options.cut_loops


def test_a_hypothesis_that_loops_is_decoded_again_in_any_batch(tiny_whispers: dict[str, str]) -> None:
    """A model that writes one token for ever: its loop ends early, is cut, and every temperature is tried."""
    transcriber = load_transcriber(tiny_whispers["large"], language="en", long_audio=None)
    model = transcriber.model
    model.network.config.max_target_positions = 128
    with torch.no_grad():
        positions = torch.zeros(128, model.network.config.d_model)
        model.network.model.decoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
        # the same input at every position, whatever was said
        model.network.model.decoder.embed_positions.forward = lambda ids, past=0, **_: positions[: ids.shape[1]]
        model.network.model.decoder.embed_tokens.weight.normal_(std=1e-3)
    model.network.model.decoder.layer_norm.bias.data = 100 * model.network.model.decoder.embed_tokens.weight[65].data
    wavs = torch.randn(3, 2 * RATE, generator=torch.Generator().manual_seed(0))
    fallback = transcriber.options.for_long_audio()
    cut = replace(fallback, temperatures=(0.0,))
    with torch.no_grad():
        encoded = model.encode(wavs, torch.full((3,), 2 * RATE))
        whole = decode(model, encoded, ["en"] * 3, transcriber.options)
        once = decode(model, encoded, ["en"] * 3, cut)
        again = decode(model, encoded, ["en"] * 3, fallback)
        alone = decode(model, encoded.select(torch.tensor([1])), ["en"], fallback)[0]
    assert all(len(h.tokens) > 100 and not h.looped for h in whole)  # to the limit: what the model says by itself
    assert all(
        len(h.tokens) < 40 and h.looped and h.tokens == w.tokens[: len(h.tokens)]
        for h, w in zip(once, whole, strict=True)
    )
    assert all(h.temperature > 0 for h in again) and again[1].tokens == alone.tokens


def test_words_behind_the_timestamps_are_words(tiny_whispers: dict[str, str]) -> None:
    """A tokenizer with words added behind its timestamps."""
    timestamps = range(100, 201)
    said = [100, 5, 250, 110, 110, 300, 7, 120, 130, 9]
    found = split_segments(said, timestamps, 2.0)
    assert found == [(0.0, 0.2, [5, 250]), (0.2, 0.4, [300, 7]), (0.6, 2.0, [9])]
    rules = TimestampRules(timestamps, 90, 99, begin=1, first_max=50)
    scores = torch.zeros(1, 400)
    scores[0, 350] = 20.0  # a word behind the timestamps, by far the likeliest
    after_text = rules(torch.tensor([[1, 100, 5]]), scores)
    assert int(after_text.argmax()) == 350
    first = rules(torch.tensor([[1]]), scores)
    assert set(first.isfinite().nonzero()[:, 1].tolist()) == set(range(100, 151))
    in_pair = rules(torch.tensor([[1, 100, 5, 120]]), scores)  # the second of the pair, or the end, must follow
    assert not in_pair[0, 350].isfinite() and not in_pair[0, 5].isfinite() and in_pair[0, 120].isfinite()
    assert not in_pair[0, 119].isfinite()


def test_timestamp_rules_are_those_of_transformers() -> None:
    """Where no words stand behind the timestamps, both forbid the same."""
    from transformers import GenerationConfig
    from transformers.generation import WhisperTimeStampLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    config = GenerationConfig(eos_token_id=90, no_timestamps_token_id=99, max_initial_timestamp_index=50)
    for tokens in (
        [1],
        [1, 100],
        [1, 100, 5],
        [1, 100, 5, 120],
        [1, 100, 5, 120, 120],
        [1, 100, 5, 120, 120, 6],
        [1, 100, 5, 6, 7],
    ):
        scores = torch.randn(4, 201, generator=generator) * 3
        ids = torch.tensor([tokens] * 4)
        theirs = WhisperTimeStampLogitsProcessor(config, begin_index=1)(ids, scores)
        torch.testing.assert_close(TimestampRules(range(100, 201), 90, 99, 1, 50)(ids, scores), theirs)


@pytest.mark.real
@pytest.mark.slow
def test_real_recordings_cut_anywhere(real_data: Any, real_models: Any) -> None:
    """Segments stay in order and are the text wherever a real recording begins, with timestamps and without."""
    from efficient_asr.data import load_audio

    wav = load_audio(next((real_data / "longform" / "audio").glob("librispeech_1688*")))
    for options in ({}, {"timestamps": True}):
        transcriber = load_transcriber(real_models / "whisper-tiny", language="en", **options)
        for start in np.random.default_rng(0).integers(0, 20 * RATE, 1):
            (found,) = transcriber.transcribe(wav[None, start:], torch.ones(1))
            assert_in_order(found, (len(wav) - start) / RATE)
            assert len(found.text.split()) > 80


@pytest.mark.real
@pytest.mark.parametrize("method", ["overlap", "pauses", "sequential"])
def test_real_long_speech(method: str, real_data: Any, real_models: Any) -> None:
    from efficient_asr.data import Rows, load_audio, read_manifest
    from efficient_asr.evaluation.benchmark import Benchmark
    from efficient_asr.evaluation.evaluator import evaluate

    rows = [row for row in read_manifest(real_data / "longform" / "manifest.jsonl") if row["id"].startswith("LJ001")]
    assert rows and len(load_audio(rows[0]["audio"])) > 45 * RATE
    transcriber = load_transcriber(
        str(real_models / "whisper-tiny"), language="en", long_audio=method, max_tokens_per_s=15.0
    )
    # a limit of 460 tokens a window, more than there are positions
    result = evaluate(transcriber, Benchmark("x", "y", Rows.of(rows), "whisper"), measure_macs=False, repeats=0)
    assert result.wer_percent < 12


def test_speech_without_a_pause_is_cut_where_it_is_quietest() -> None:
    window, rng = 5 * 16000, np.random.default_rng(0)
    wav = torch.from_numpy(rng.normal(0, 0.3, 9 * 16000)).float()
    wav[int(4.2 * 16000) : int(4.5 * 16000)] *= 0.3  # in the last third of the window, and no pause
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(long_audio, "voice_activity", lambda wav: [(0, len(wav))])
        (first, second) = speech_spans(wav, window)
    assert first[0] == 0 and first[1] == second[0] and second[1] == len(wav)
    assert 4.2 <= first[1] / 16000 <= 4.5


def test_sequential_decoding_gets_the_whole_recording() -> None:
    heard = []

    class Sequential(Transcriber):
        window_s = 2.0

        def check_sequential(self) -> None:
            pass

        def for_long_audio(self) -> Sequential:
            return self

        def transcribe_sequentially(self, wav: torch.Tensor, language: str | None = None) -> Transcript:
            heard.append(len(wav))
            return Transcript("a", {"segments": [{"start_s": 0.0, "end_s": 1.0, "text": "a"}]})

    assert LongAudio(Sequential(), "sequential").transcribe(torch.zeros(1, 80000))[0].text == "a"
    assert heard == [80000]
