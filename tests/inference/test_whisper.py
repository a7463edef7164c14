"""Whisper as a recogniser: batches, options, language detection, fallback, training rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from efficient_asr import load_transcriber
from efficient_asr.data import pad_wavs
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.whisper.decoding import DecodingOptions, compression_ratio
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.search import decode
from efficient_asr.utils.errors import UserError


@pytest.fixture
def whisper(tiny_whispers: dict[str, str]) -> Whisper:
    return Whisper.from_source(tiny_whispers["large"])


FALLBACK = {"temperatures": [0.0, 0.4, 1.0], "logprob_threshold": 0.0}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, FALLBACK, {"no_speech_threshold": 0.6}])
def test_a_batch_is_transcribed_as_batch_1(options: dict, wavs: list[torch.Tensor]) -> None:
    transcriber = load_transcriber("efficient_asr:mini_whisper_small", language="en", **options)
    together = transcriber.transcribe(*pad_wavs(wavs))
    alone = [transcriber.transcribe(wav[None], torch.ones(1))[0] for wav in wavs]
    assert [t.text for t in together] == [t.text for t in alone] and len({t.text for t in alone}) > 1
    for a, b in zip(together, alone, strict=True):
        assert a.details["avg_logprob"] == pytest.approx(b.details["avg_logprob"], abs=1e-5)


def test_greedy_equals_plain_search_without_a_cache(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    """Tokens, mean log-probability and entropy against a loop that runs the whole decoder for every token."""
    wav, options = wavs[1][None], DecodingOptions()
    encoded = whisper.encode(wav, torch.tensor([wav.shape[1]]))
    (found,) = decode(whisper, encoded, ["en"], options)
    tokens, log_probs, entropies = whisper.labels.prompt("en", options), [], []
    prompt = len(tokens)
    with torch.no_grad():
        while len(tokens) < whisper.network.config.max_target_positions:
            logits = whisper.network(
                encoder_outputs=(encoded.states,), decoder_input_ids=torch.tensor([tokens])
            ).logits[0, -1]
            distribution = logits.double().log_softmax(0)
            tokens.append(int(distribution.argmax()))
            log_probs.append(float(distribution.max()))
            entropies.append(float(-(distribution.exp() * distribution).sum()))
            if tokens[-1] == whisper.labels.end:
                break
    assert found.tokens == [token for token in tokens[prompt:] if token != whisper.labels.end]
    assert found.avg_logprob == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-4)
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


def test_wider_beams_find_likelier_texts(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    def total(beams: int, wav: torch.Tensor) -> float:
        (found,) = decode(
            whisper, whisper.encode(wav[None], torch.tensor([len(wav)])), ["en"], DecodingOptions(num_beams=beams)
        )
        return found.avg_logprob * (len(found.tokens) + 1)

    with torch.no_grad():
        sums = [(total(1, wav), total(6, wav)) for wav in wavs]
    assert sum(b for _, b in sums) > sum(a for a, _ in sums)


def test_features_are_whispers_own(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    extractor = WhisperFeatureExtractor(80, chunk_length=2)
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    ours = whisper.features(batch, torch.tensor([len(wav) for wav in wavs]))
    for row, wav in zip(ours, wavs, strict=True):
        theirs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(row, theirs, atol=2e-4, rtol=0)


def test_suppressed_tokens_are_never_written(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    encoded = whisper.encode(wavs[0][None], torch.tensor([len(wavs[0])]))
    with torch.no_grad():
        (free,) = decode(whisper, encoded, ["en"], DecodingOptions())
        whisper.network.generation_config.suppress_tokens = [free.tokens[0]]
        (banned,) = decode(whisper, encoded, ["en"], DecodingOptions())
        (again,) = decode(whisper, encoded, ["en"], DecodingOptions(suppress=False))
    assert free.tokens[0] not in banned.tokens and again.tokens == free.tokens


def test_language_is_detected_among_languages_only(whisper: Whisper) -> None:
    logits = torch.zeros(2, whisper.network.config.vocab_size)
    logits[:, whisper.tokenizer.convert_tokens_to_ids("<|translate|>")] = 9.0
    assert whisper.detect_languages(logits) == ["en", "en"]
    whisper.labels.languages = {"en": 3, "nl": 7}
    logits[0, 3], logits[1, 7] = 1.0, 1.0
    assert whisper.detect_languages(logits) == ["en", "nl"]


def test_where_no_language_is_given_it_is_in_the_details(
    tiny_whispers: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    (found,) = load_transcriber(tiny_whispers["small"]).transcribe(wavs[0][None], torch.ones(1))
    assert found.details["language"] == "en"
    (given,) = load_transcriber(tiny_whispers["small"], language="en").transcribe(wavs[0][None], torch.ones(1))
    assert "language" not in given.details and given.text == found.text


def test_fallback_raises_the_temperature_only_where_a_text_fails(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    options = {"temperatures": (0.0, 0.5), "compression_ratio_threshold": math.inf}
    encoded = whisper.encode(wavs[0][None], torch.tensor([len(wavs[0])]))
    with torch.no_grad():
        for threshold, temperature in ((0.0, 0.5), (-math.inf, 0.0)):
            (found,) = decode(whisper, encoded, ["en"], DecodingOptions(logprob_threshold=threshold, **options))
            assert found.temperature == temperature
        before = torch.random.get_rng_state()
        decode(whisper, encoded, ["en"], DecodingOptions(logprob_threshold=0.0, **options))
        assert torch.equal(before, torch.random.get_rng_state())  # training would otherwise not be repeatable


def test_sampling_from_the_start_repeats_and_does_not_depend_on_the_batch(
    whisper: Whisper, wavs: list[torch.Tensor]
) -> None:
    padded = torch.nn.utils.rnn.pad_sequence(list(wavs), batch_first=True)
    lengths = torch.tensor([len(wav) for wav in wavs])
    options = DecodingOptions(temperatures=(0.8,), max_new_tokens=8)
    with torch.no_grad():
        together = decode(whisper, whisper.encode(padded, lengths), ["en"] * len(wavs), options)
        for i, wav in enumerate(wavs):
            (alone,) = decode(whisper, whisper.encode(wav[None], lengths[i : i + 1]), ["en"], options)
            assert alone.tokens == together[i].tokens and alone.temperature == 0.8


def test_silence_gives_an_empty_text(whisper: Whisper, wavs: list[torch.Tensor]) -> None:
    encoded = whisper.encode(wavs[0][None], torch.tensor([len(wavs[0])]))
    with torch.no_grad():
        (found,) = decode(whisper, encoded, ["en"], DecodingOptions(no_speech_threshold=0.0, logprob_threshold=0.0))
        (kept,) = decode(whisper, encoded, ["en"], DecodingOptions(no_speech_threshold=1.0, logprob_threshold=0.0))
    assert found.text == "" and found.no_speech_prob > 0 and kept.text


def test_compression_ratio_is_high_for_repetitions() -> None:
    assert compression_ratio("no " * 50) > 5 > 1.2 > compression_ratio("turn on the light")


@pytest.mark.parametrize(("options", "message"), [
    ({"beams": 2}, "not a decoding option"), ({"num_beams": 0}, "less than 1"),
    ({"task": "translation"}, "use transcribe or translate"),
    ({"temperatures": []}, "between 0 and 2"), ({"language": "xx"}, "does not know 'xx'"),
    ({"long_audio": "cut"}, "invalid method 'cut'; use overlap"), ({"lm_path": "x.arpa"}, "require a CTC model"),
])  # fmt: skip
def test_mistakes_are_explained(options: dict, message: str, tiny_whispers: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        load_transcriber(tiny_whispers["small"], **options)


def test_saved_directories_are_transformers_own(whisper: Whisper, tmp_path: Path, wavs: list[torch.Tensor]) -> None:
    whisper.save(tmp_path / "w", {"recipe": "finetune_whisper"}, torch.float16)
    network = WhisperForConditionalGeneration.from_pretrained(tmp_path / "w", dtype=torch.float32)
    assert network.config.d_model == 32 and whisper.network.dtype == torch.float32
    assert json.loads((tmp_path / "w" / "config.json").read_text())["about"] == {"recipe": "finetune_whisper"}
    texts = [
        t.transcribe(wavs[2][None], torch.ones(1))[0].text
        for t in (WhisperTranscriber(whisper, "en"), load_transcriber(str(tmp_path / "w"), language="en"))
    ]
    assert texts[0][:3] == texts[1][:3]


def test_training_rows_hold_prompt_text_and_end(whisper: Whisper) -> None:
    tokens = whisper.labels.encode_row({"text": "turn on the light"})
    assert len(whisper.labels.prompt("en", DecodingOptions())) == whisper.labels.prompt_length
    assert (
        whisper.tokenizer.decode(tokens)
        == "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>turn on the light<|endoftext|>"
    )
    with pytest.raises(UserError, match="does not know 'nl'"):
        whisper.labels.encode_row({"text": "aan", "language": "nl"})


@pytest.mark.real
def test_whisper_tiny_agrees_with_the_reference(real_data: Path, real_models: Path) -> None:
    """On librispeech_test_other it is 21.10 (results/distil_whisper/base.json), which takes too long here."""
    from efficient_asr.evaluation.benchmark import Benchmark
    from efficient_asr.evaluation.evaluator import evaluate

    benchmark = Benchmark.from_manifest(real_data / "ljspeech" / "manifest.jsonl", normaliser="whisper")
    transcriber = load_transcriber(str(real_models / "whisper-tiny"), language="en")
    result = evaluate(transcriber, benchmark, measure_macs=False, repeats=0)
    assert result.wer_percent == pytest.approx(6.22, abs=0.2)
