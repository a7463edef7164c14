"""Silence cache and own-length encoding: identity, exactness against transformers' layers, batches, files, guard."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.commands import run_command
from efficient_asr.data import pad_wavs
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.sources import resolve_source
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded
from efficient_asr.models.whisper.greedy import Decoder
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.techniques.silence_cache.cache import SilenceCache, attention_to, noise_bursts
from efficient_asr.utils.errors import UserError

MINI = "efficient_asr:mini_whisper_small"


@pytest.fixture
def whisper(tiny_whispers: dict[str, str]) -> Whisper:
    return Whisper.from_source(tiny_whispers["large"])


@pytest.fixture
def short(wavs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Recordings that leave room in a window of 2 s."""
    return [wav[: 4000 + 3210 * i] for i, wav in enumerate(wavs)]


def lengths_of(wavs: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([len(wav) for wav in wavs])


def test_thirty_seconds_of_silence_are_the_plain_model_bit_for_bit(whisper: Whisper, short: list[torch.Tensor]) -> None:
    wavs, lengths = pad_wavs(short)[0], lengths_of(short)
    with torch.no_grad():
        plain = whisper.encode(wavs, lengths, True)
        whisper.encoder_padding = SilenceCache.calibrate(whisper, padding_s=30.0)
        found = whisper.encode(wavs, lengths, True)
    assert torch.equal(found.states, plain.states) and found.own is None
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, plain.hidden_states, strict=True))


def with_equal_groups(cache: SilenceCache) -> SilenceCache:
    """Give all positions of a group the same states, so that groups are exact."""
    for group in cache.groups():
        cache.states[:, group] = cache.states[:, group].mean(dim=1, keepdim=True)
    return cache


@pytest.mark.parametrize(("group", "sinks"), [(1, 0), (5, 0), (5, 12)])
def test_states_are_those_of_the_plain_layers_with_cached_silence(
    whisper: Whisper, short: list[torch.Tensor], group: int, sinks: int
) -> None:
    """Every layer of transformers' encoder, given the utterance's states and, behind them, the cached ones."""
    cache = with_equal_groups(SilenceCache.calibrate(whisper, padding_s=0.1, group=group, sinks=sinks))
    whisper.encoder_padding, network, wav = cache, whisper.network.model.encoder, short[1]
    with torch.no_grad():
        found = whisper.encode(wav[None], torch.tensor([len(wav)]), True)
        own = int(found.own[0])
        assert own == -(-(int(encoder_frames(len(wav))) + 5) // group) * group
        features = whisper.features(wav[None], torch.tensor([len(wav)]))
        x = torch.nn.functional.gelu(network.conv1(features))
        x = torch.nn.functional.gelu(network.conv2(x)).transpose(1, 2) + network.embed_positions.weight
        for i, layer in enumerate(network.layers):
            x = torch.cat([x[:, :own], cache.states[i, None, own:]], dim=1)
            torch.testing.assert_close(found.hidden_states[i], x, atol=1e-5, rtol=1e-5)
            x = layer(x, None)
        expected = torch.cat([network.layer_norm(x)[:, :own], cache.states[-1, None, own:]], dim=1)
    torch.testing.assert_close(found.states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("group", "sinks"), [(1, 0), (5, 0), (5, 12)])
def test_the_decoder_sees_the_whole_window(whisper: Whisper, short: list[torch.Tensor], group: int, sinks: int) -> None:
    """Scores with cached keys of silence against transformers' decoder on the completed states."""
    whisper.encoder_padding = with_equal_groups(
        SilenceCache.calibrate(whisper, padding_s=0.1, group=group, sinks=sinks)
    )
    tokens = torch.tensor([[3, 7, 11]] * len(short))
    with torch.no_grad():
        encoded = whisper.encode(pad_wavs(short)[0], lengths_of(short))
        scores = Decoder(whisper.network, encoded, 8).step(tokens)
        expected = whisper.predict(encoded, tokens)
    assert len({*encoded.own.tolist()}) > 1
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("padding", ["silence_cache", "0.3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_transcribed_as_batch_1(padding: str, together: bool, beams: int, wavs: list[torch.Tensor]) -> None:
    """One by one, bit for bit; together (as on a GPU), up to rounding."""
    transcriber = load_transcriber(MINI, language="en", encoder_padding=padding, num_beams=beams, retry_logprob=None)
    alone = [transcriber.transcribe(wav[None])[0] for wav in wavs]
    transcriber.model.encoder_padding.together = together
    batch = transcriber.transcribe(*pad_wavs(wavs))
    assert [t.text for t in batch] == [t.text for t in alone] and len({t.text for t in alone}) > 1
    for a, b in zip(batch, alone, strict=True):
        assert a.details["avg_logprob"] == pytest.approx(b.details["avg_logprob"], abs=1e-5)
        assert a.details["encoder_s"] == b.details["encoder_s"]
    if not together:
        model, lengths = transcriber.model, lengths_of(wavs)
        with torch.no_grad():
            states = model.encode(pad_wavs(wavs)[0], lengths).states
            for row, wav in enumerate(wavs):
                one = model.encode(wav[None], lengths[row : row + 1])
                assert torch.equal(states[row, : int(one.own)], one.states[0, : int(one.own)])


def test_the_cache_is_the_mean_state_of_silence(whisper: Whisper) -> None:
    wavs = [torch.randn(size, generator=torch.Generator().manual_seed(size)) * 0.1 for size in (3200, 6400)]
    cache = SilenceCache.calibrate(whisper, wavs)
    with torch.no_grad():
        found = [torch.stack(whisper.encode(w[None], torch.tensor([len(w)]), True).hidden_states)[:, 0] for w in wavs]
    assert [int(encoder_frames(len(wav))) for wav in wavs] == [10, 20]
    torch.testing.assert_close(cache.states[:, 21:], (found[0] + found[1])[:, 21:] / 2)
    torch.testing.assert_close(cache.states[:, 11:21], found[0][:, 11:21])  # the other recording is not silent there
    torch.testing.assert_close(cache.states[:, :11], found[0][:, 11:12].expand(-1, 11, -1))


def test_positions_that_the_decoder_attends_to_stay_alone(whisper: Whisper) -> None:
    """The mean of transformers' own attention; every position is in one group; a block begins behind what is computed."""
    wav = torch.randn(6400, generator=torch.Generator().manual_seed(1)) * 0.1
    cache = SilenceCache.calibrate(whisper, [wav], group=8, sinks=9)
    implementation = whisper.network.config._attn_implementation
    whisper.network.set_attn_implementation("eager")
    with torch.no_grad():
        states = whisper.encode(wav[None], torch.tensor([len(wav)])).states
        prompt = torch.tensor([whisper.labels.prompt("en" if whisper.labels.languages else None, DecodingOptions())])
        out = whisper.network(
            encoder_outputs=(states,), decoder_input_ids=prompt, output_attentions=True, use_cache=False
        ).cross_attentions
    whisper.network.set_attn_implementation(implementation)
    weight = torch.stack(out).mean(dim=(0, 1, 2, 3))
    first = int(encoder_frames(len(wav))) + 1
    torch.testing.assert_close(attention_to(whisper, Encoded(states, torch.tensor([len(wav)])), prompt), weight)
    weight[:first] = 0
    assert cache.sinks == sorted(weight.topk(9).indices.tolist())
    groups, tail = cache.groups(), cache.tail(whisper)
    assert sorted(itertools.chain(*groups)) == list(range(len(weight)))
    assert all([position] in groups for position in cache.sinks)
    assert tail.starts.tolist() == [group[0] // 8 * 8 for group in groups] == sorted(tail.starts.tolist())
    assert tail.log_weights.exp().sum() == pytest.approx(len(weight), rel=1e-5)
    for own in (8, 48, 96):
        seen = groups[tail.first(torch.tensor([own])) :]
        assert sorted(itertools.chain(*seen)) == list(range(own, len(weight)))
    for sinks in ([0, 0], [-1], [len(weight)], ["a"]):
        with pytest.raises(UserError, match="sinks: not different positions"):
            SilenceCache(**cache.to_config() | {"sinks": sinks})


def test_all_positions_alone_is_no_groups(whisper: Whisper, short: list[torch.Tensor]) -> None:
    """The identity; and a folder of before there were sinks has none."""
    plain = SilenceCache.calibrate(whisper, group=1)
    alone = SilenceCache.calibrate(whisper, group=5, sinks=len(plain.states[0]))
    plain.step = 5  # the same number of positions
    found = []
    for padding in (plain, alone):
        whisper.encoder_padding = padding
        with torch.no_grad():
            encoded = whisper.encode(pad_wavs(short)[0], lengths_of(short))
            found.append((encoded.states, Decoder(whisper.network, encoded, 4).step(torch.tensor([[3]] * len(short)))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    former = SilenceCache.calibrate(whisper, group=5, sinks=0)
    assert "sinks" not in former.to_config() and former.label == "silence cache, 0.2 s, groups of 5"


def test_calibration_needs_recordings_shorter_than_the_window(whisper: Whisper) -> None:
    with pytest.raises(UserError, match="shorter than the model's window"):
        SilenceCache.calibrate(whisper, [])


def test_a_folder_keeps_its_cache(whisper: Whisper, short: list[torch.Tensor], tmp_path: Path) -> None:
    whisper.encoder_padding = SilenceCache.calibrate(whisper, padding_s=0.3, group=2, sinks=7)
    whisper.save(tmp_path / "model")
    options = {"language": "en", "retry_logprob": None}
    texts = [load_transcriber(tmp_path / "model", **options).transcribe(wav[None])[0].text for wav in short]
    here = WhisperTranscriber(whisper, "en", DecodingOptions(retry_logprob=None))
    assert texts == [here.transcribe(wav[None])[0].text for wav in short]
    loaded = load_transcriber(tmp_path / "model", language="en")
    assert loaded.model.encoder_padding.to_config() == whisper.encoder_padding.to_config()
    assert (loaded.technique, loaded.label) == ("silence_cache", "silence cache, 0.3 s, groups of 2 but for 7")
    plain = load_transcriber(tmp_path / "model", language="en", encoder_padding=30)
    assert plain.model.encoder_padding is None and plain.label == "baseline"
    assert load_transcriber(tmp_path / "model", padding_s=0.5).model.encoder_padding.padding_s == 0.5
    again = load_transcriber(tmp_path / "model").model
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "encoder_padding.safetensors").is_file()
    again.reset_metadata()  # as training does
    again.save(tmp_path / "trained")
    assert "encoder_padding" not in json.loads((tmp_path / "trained" / "config.json").read_text())


def test_a_cache_of_other_weights_is_refused(whisper: Whisper, tmp_path: Path) -> None:
    whisper.encoder_padding = SilenceCache.calibrate(whisper)
    with torch.no_grad():
        whisper.network.model.encoder.conv1.bias += 1
    whisper.save(tmp_path / "model")
    with pytest.raises(UserError, match="made for other weights; run: efficient-asr calibrate"):
        load_transcriber(tmp_path / "model")
    assert load_transcriber(tmp_path / "model", encoder_padding=30).model.encoder_padding is None
    assert run_command("calibrate", [str(tmp_path / "model"), "--out", str(tmp_path / "calibrated")]) == 0
    assert load_transcriber(tmp_path / "calibrated").model.encoder_padding is not None
    (tmp_path / "model" / "encoder_padding.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match="the silence cache cannot be read"):
        load_transcriber(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_padding": "silence"},
            "neither a number of seconds nor one of silence_cache. Did you mean 'silence_cache'",
        ),
        ({"encoder_padding": "downsampler"}, "neither a number of seconds nor one of silence_cache"),
        ({"encoder_padding": -1.0}, "padding_s: -1.0 is not a number of seconds"),
        ({"padding_s": 1.0}, "pass encoder_padding as well"),
        ({"encoder_padding": 5, "padding_s": 1.0}, "give one of the two"),
        ({"encoder_padding": "silence_cache", "padding_s": "x"}, "padding_s: 'x' is not a number of seconds"),
        ({"encoder_padding": "²"}, "neither a number of seconds nor one of"),
        ({"retry_logprob": "low"}, "retry_logprob: 'low' is not a number"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_transcriber(MINI, **options)


def test_a_hypothesis_that_looks_wrong_is_decoded_from_the_whole_window(wavs: list[torch.Tensor]) -> None:
    plain = [load_transcriber(MINI, language="en").transcribe(wav[None])[0] for wav in wavs]
    own = load_transcriber(MINI, language="en", encoder_padding=0.0, retry_logprob=None)
    guarded = load_transcriber(MINI, language="en", encoder_padding=0.0, retry_logprob=1.0)  # always
    alone = [own.transcribe(wav[None])[0] for wav in wavs]
    again = guarded.transcribe(*pad_wavs(wavs))
    assert [t.text for t in alone] != [t.text for t in plain]
    assert [t.text for t in again] == [t.text for t in plain]
    assert all(t.details["encoded_again"] for t in again) and "encoded_again" not in alone[0].details
    records = [t.details for t in (*again, *alone)]
    assert guarded.summary(records)["encoded_again_percent"] == 50
    assert guarded.cost_key(again[0]) is None and own.cost_key(alone[0]) is not None


def test_macs_follow_the_audio(wavs: list[torch.Tensor]) -> None:
    plain, own = (
        load_transcriber(MINI, language="en"),
        load_transcriber(MINI, language="en", encoder_padding="silence_cache"),
    )
    wav = wavs[0][None, :8000]
    encode = [count_macs(lambda t=t: t.encode(wav)).macs for t in (plain, own)]
    positions, shape = int(own.encode(wav).own), own.encoder_shape()
    assert encode[1] < encode[0] * 1.5 * positions / shape[2]
    assert encode[1] == count_macs(lambda: own.encode(wav)).macs  # nothing was made for later ones


def test_plain_own_length_sees_nothing_behind_the_padding(whisper: Whisper, short: list[torch.Tensor]) -> None:
    whisper.encoder_padding = OwnLength(0.2)
    wav = short[0]
    with torch.no_grad():
        encoded = whisper.encode(wav[None], torch.tensor([len(wav)]))
    assert encoded.states.shape[1] == int(encoded.own) == int(encoder_frames(len(wav))) + 10 and encoded.tail is None
    assert whisper.encoder_padding.with_padding(0.5).padding_s == 0.5


def test_noise_for_calibration_is_always_the_same() -> None:
    assert all(torch.equal(a, b) for a, b in zip(noise_bursts(), noise_bursts(), strict=True))
    assert 0.01 < noise_bursts()[0].std() < 0.2


def test_fallback_samples_from_the_whole_window_that_the_guard_encoded(wavs: list[torch.Tensor]) -> None:
    options = {"language": "en", "temperatures": [0.0, 0.6], "logprob_threshold": 5.0}
    plain = load_transcriber(MINI, **options)
    guarded = load_transcriber(MINI, encoder_padding=0.0, retry_logprob=5.0, **options)
    for wav in wavs[:3]:
        found = guarded.transcribe(wav[None])[0]
        assert found.text == plain.transcribe(wav[None])[0].text and found.details["encoded_again"]


def test_an_utterance_that_fills_the_window_is_not_encoded_again(wavs: list[torch.Tensor]) -> None:
    transcriber = load_transcriber(MINI, language="en", encoder_padding="silence_cache", retry_logprob=5.0)
    full = torch.randn(transcriber.model.window_samples, generator=torch.Generator().manual_seed(0)) * 0.1
    alone, (together, _) = transcriber.transcribe(full[None]), transcriber.transcribe(*pad_wavs([full, wavs[0]]))
    assert alone[0].text == together.text
    assert "encoded_again" not in together.details and "encoded_again" not in alone[0].details


def test_a_token_limit_of_the_user_is_no_reason_to_encode_again(wavs: list[torch.Tensor]) -> None:
    options = {"encoder_padding": "silence_cache", "max_new_tokens": 2, "retry_logprob": -100.0}
    found = load_transcriber(MINI, language="en", **options).transcribe(wavs[0][None])[0]
    assert found.details["tokens"] == 2 and "encoded_again" not in found.details


def test_a_number_of_seconds_is_evaluated_and_saved(wavs: list[torch.Tensor], tmp_path: Path) -> None:
    transcriber = load_transcriber(MINI, language="en", encoder_padding="0.3")
    assert transcriber.settings["encoder_padding"] == {"type": "own_length", "config": {"padding_s": 0.3}}
    transcriber.model.save(tmp_path / "model")
    again = load_transcriber(tmp_path / "model", language="en")
    assert (again.label, again.technique) == ("own length + 0.3 s", "none")
    assert again.transcribe(wavs[0][None])[0].text == transcriber.transcribe(wavs[0][None])[0].text


def test_experts_of_a_batch_are_those_of_batch_1(wavs: list[torch.Tensor], tmp_path: Path) -> None:
    from efficient_asr.techniques.clsr.experts import ExpertSettings
    from efficient_asr.techniques.clsr.model import add_experts

    model = add_experts(Whisper.from_source(resolve_source(MINI)), ["en"], ExpertSettings())
    plain = load_transcriber(MINI, language="en", encoder_padding="silence_cache", retry_logprob=None)
    for part in model.network.expert("en").values():
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    model.encoder_padding = SilenceCache.calibrate(model, language="en")
    model.save(tmp_path / "experts")
    transcriber = load_transcriber(tmp_path / "experts", language="en", retry_logprob=None)
    alone = [transcriber.transcribe(wav[None])[0].text for wav in wavs]
    assert [t.text for t in transcriber.transcribe(*pad_wavs(wavs))] == alone
    assert alone != [plain.transcribe(wav[None])[0].text for wav in wavs]  # the experts were heard
    assert transcriber.technique == "clsr + silence_cache"
