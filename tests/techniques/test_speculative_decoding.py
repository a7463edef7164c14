"""Speculative decoding: the text is that of the model, whatever the assistant says, and passes are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import multilingual_whisper

from efficient_asr import load_transcriber
from efficient_asr.data import load_audio, pad_wavs
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.search import decode
from efficient_asr.techniques.pruning import prune
from efficient_asr.techniques.speculative_decoding import DRAFT, SpeculativeWhisper
from efficient_asr.utils.errors import UserError


@pytest.mark.parametrize("kind", ["itself", "student", "stranger"])
def test_the_text_is_that_of_the_model_alone(kind: str, wavs: list[torch.Tensor]) -> None:
    model = multilingual_whisper(3, layers=3, max_tokens=40)
    assistant = {
        "itself": lambda: multilingual_whisper(3, layers=3, max_tokens=40),
        "student": lambda: prune(multilingual_whisper(3, layers=3, max_tokens=40), -1, 2),
        "stranger": lambda: multilingual_whisper(8, layers=1, max_tokens=40),
    }[kind]()
    temperatures = None if kind == "itself" else (0.0, 0.4)  # the fallback samples, which an assistant cannot guess
    options = DecodingOptions(temperatures=temperatures, logprob_threshold=-0.5)
    both = SpeculativeWhisper(model, assistant)
    assert both.same_encoder == (kind != "stranger")
    for wav in wavs:
        with torch.no_grad():
            lengths = torch.tensor([len(wav)])
            (alone,) = decode(model, model.encode(wav[None], lengths), ["en"], options)
            (found,) = decode(both, both.encode(wav[None], lengths), ["en"], options)
        assert found.tokens == alone.tokens and found.text == alone.text
        assert found.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)
        if kind == "itself":  # everything is accepted
            assert found.details["tokens_per_pass"] > min(DRAFT, len(found.tokens)) / 2


def test_a_batch_is_decoded_without_the_assistant(wavs: list[torch.Tensor]) -> None:
    model = multilingual_whisper(3)
    both = SpeculativeWhisper(model, multilingual_whisper(3))
    batch, lengths = pad_wavs(wavs)[0], torch.tensor([len(wav) for wav in wavs])
    with torch.no_grad():
        found = decode(both, both.encode(batch, lengths), ["en"] * 4, DecodingOptions())
        alone = decode(model, model.encode(batch, lengths), ["en"] * 4, DecodingOptions())
    assert [each.tokens for each in found] == [each.tokens for each in alone]
    assert not any("tokens_per_pass" in each.details for each in found)


def test_the_tables_name_the_assistant(tiny_whispers: dict[str, str]) -> None:
    both = load_transcriber(tiny_whispers["large"], language="en", assistant=tiny_whispers["small"])
    assert both.changes == ["assistant with 1 decoder layers"] and both.label == both.changes[0]
    assert both.technique == "speculative_decoding" and both.batch_size == 1
    records = [
        {"tokens_per_pass": 2.0, "segments": [{"text": "timed"}]},
        {"segments": [{"tokens_per_pass": 3.0}, {"tokens_per_pass": 4.0}, {}]},
    ]
    assert both.summary(records)["tokens_per_pass"] == 3.0


def test_models_that_do_not_fit_are_refused(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary differs"):
        SpeculativeWhisper(multilingual_whisper(0), multilingual_whisper(0, ["entirely other words", "zebra"]))
    with pytest.raises(UserError, match="window"):
        SpeculativeWhisper(multilingual_whisper(0), multilingual_whisper(0, window_s=3.0))
    with pytest.raises(UserError, match="same encoder"):
        load_transcriber(tiny_whispers["large"], assistant=tiny_whispers["small"], encoder_padding=0.5)
    with pytest.raises(UserError, match="assistant"):
        load_transcriber(tiny_whispers["large"], assistant=str(tmp_path))


def test_it_is_an_option_of_any_whisper(tiny_whispers: dict[str, str], corpus: Path) -> None:
    wav = load_audio(corpus / "u1.wav")
    alone = load_transcriber(tiny_whispers["large"], language="en")
    with_int8 = {"quantise": "decoder-int8"}
    for options in ({}, with_int8):
        reference = load_transcriber(tiny_whispers["large"], language="en", **options)
        found = load_transcriber(tiny_whispers["large"], language="en", assistant=tiny_whispers["small"], **options)
        assert found.transcribe(wav)[0].text == reference.transcribe(wav)[0].text
        assert found.technique == "speculative_decoding" and "assistant" in str(found.settings)
    assert "assistant" not in str(alone.settings)
    with pytest.raises(UserError, match="num_beams"):
        load_transcriber(tiny_whispers["large"], assistant=tiny_whispers["small"], num_beams=2)


def test_equal_encoders_are_known_as_such_also_in_int8(tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    large = tiny_whispers["large"]
    prune(Whisper.from_source(large), -1, 1).save(tmp_path / "student")
    options = {"assistant": str(tmp_path / "student"), "encoder_padding": 0.5, "quantise": "int8"}
    found = load_transcriber(large, **options)
    plain = [sum(p.numel() for p in Whisper.from_source(f).network.parameters()) for f in (large, options["assistant"])]
    assert found.parameters_count() == sum(plain)
    assert found.model.same_encoder and found.model.quantised == found.model.assistant.quantised == "int8"
