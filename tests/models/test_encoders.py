from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import environment_folder
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from efficient_asr.data import pad_wavs
from efficient_asr.models.encoders.base import masked_layer_norm
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.models.sources import resolve_source
from efficient_asr.utils.errors import UserError

KINDS = ["wav2vec2-base", "wav2vec2-large", "hubert-base", "distilhubert", "wavlm-base", "wavlm-large"]


def lengths_of(wavs: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([len(wav) for wav in wavs])


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_layer_by_layer(kind: str, ssl_sources: dict[str, str], wavs: list[torch.Tensor]) -> None:
    encoder = load_encoder(ssl_sources[kind], output_norm=False).eval()
    reference = AutoModel.from_pretrained(ssl_sources[kind]).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(ssl_sources[kind])
    inputs = extractor(wavs[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        ours = encoder(wavs[0][None], lengths_of(wavs[:1]), output_hidden_states=True)
        theirs = reference(inputs, output_hidden_states=True)
    torch.testing.assert_close(ours.states, theirs.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == encoder.num_layers + 1
    for a, b in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output_norm", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "whisper"])
def test_states_do_not_depend_on_batch_mates(
    kind: str, output_norm: bool, ssl_sources: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    if kind == "whisper":
        torch.manual_seed(0)
        encoder = new_whisper_encoder(d_model=32, layers=2, heads=2, output_norm=output_norm).eval()
    else:
        encoder = load_encoder(ssl_sources[kind], output_norm=output_norm).eval()
    batch, _ = pad_wavs([*wavs, wavs[0].repeat(2)])
    lengths = lengths_of([*wavs, wavs[0].repeat(2)])
    with torch.no_grad():
        together = encoder(batch, lengths)
        for i, wav in enumerate(wavs):
            alone = encoder(wav[None], lengths_of([wav]))
            frames = int(alone.frame_lengths)
            assert frames == together.frame_lengths[i] == alone.states.shape[1]
            torch.testing.assert_close(together.states[i, :frames], alone.states[0], rtol=1e-4, atol=2e-5)
            assert (together.states[i, frames:] == 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "whisper"])
@pytest.mark.parametrize("samples", [0, 1, 100, 399, 400, 401, 719, 720, 16001])
def test_frame_lengths_are_what_comes_out(kind: str, samples: int, ssl_sources: dict[str, str]) -> None:
    encoder = new_whisper_encoder(32, 1, 2) if kind == "whisper" else load_encoder(ssl_sources[kind])
    with torch.no_grad():
        out = encoder.eval()(torch.zeros(2, 16001), torch.tensor([samples, 16001]))
    assert out.frame_lengths.tolist() == encoder.frame_lengths(torch.tensor([samples, 16001])).tolist()
    assert out.states.shape[1] == out.frame_lengths.max()
    assert out.states.isfinite().all()


def test_masked_layer_norm_is_layer_norm_of_the_real_frames() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 7, 5, dtype=torch.float64)
    out = masked_layer_norm(states, torch.tensor([7, 4]))
    torch.testing.assert_close(out[0], torch.nn.functional.layer_norm(states[0], (7, 5)))
    torch.testing.assert_close(out[1, :4], torch.nn.functional.layer_norm(states[1, :4], (4, 5)))
    assert (out[1, 4:] == 0).all()


def test_frozen_parts_get_no_gradient(ssl_sources: dict[str, str], wavs: list[torch.Tensor]) -> None:
    encoder = load_encoder(ssl_sources["wavlm-base"]).train()
    encoder(wavs[0][None], lengths_of(wavs[:1])).states.pow(2).sum().backward()
    assert all(p.grad is None for p in encoder.model.feature_extractor.parameters())
    assert any(p.grad is not None for p in encoder.layers[0].parameters())
    frozen = load_encoder(ssl_sources["wavlm-base"], freeze=True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_spec_augment_masks_in_training_only(ssl_sources: dict[str, str], wavs: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    encoder = load_encoder(ssl_sources["wav2vec2-large"], spec_augment=True)
    encoder.model.config.mask_time_prob, encoder.model.config.mask_time_length = 0.5, 3
    clean = encoder.eval().begin(wavs[0][None], lengths_of(wavs[:1])).states
    again = encoder.begin(wavs[0][None], lengths_of(wavs[:1])).states
    assert torch.equal(clean, again)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(clean, encoder.train().begin(wavs[0][None], lengths_of(wavs[:1])).states)


def test_batches_shorter_than_a_mask_are_not_masked(ssl_sources: dict[str, str]) -> None:
    encoder = load_encoder(ssl_sources["wav2vec2-large"], spec_augment=True).train()
    encoder.model.config.mask_time_prob, encoder.model.config.mask_time_length = 0.5, 10
    assert encoder.begin(torch.randn(1, 1600), torch.tensor([1600])).states.shape[1] < 10


def test_whisper_refuses_audio_beyond_its_positions() -> None:
    encoder = new_whisper_encoder(32, 1, 2)
    with pytest.raises(UserError, match=r"31\.0 s of audio, but this Whisper encoder has positions for 30 s"):
        encoder(torch.zeros(1, 31 * 16000), torch.tensor([31 * 16000]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("efficient_asr:nothing", "has no asset"),
        ("$SURELY_NOT_SET/x", "environment variable"),
        ("org/name-that-is-nowhere", "HF_HUB_OFFLINE is set"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(source)


def test_directory_without_or_with_a_foreign_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is of type 'bert'"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_encoder(str(tmp_path))


def test_resolve_source_expands_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/there")
    assert resolve_source("$SOMEWHERE/x") == "/there/x"


@pytest.mark.real
def test_whisper_on_its_own_length_equals_the_reference_on_30_s(real_models: Path) -> None:
    """On a full window nothing is cut, so features and states must be those of transformers."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    source = environment_folder("EFFICIENT_ASR_MODELS") / "whisper-tiny"
    torch.manual_seed(0)
    wav = 0.1 * torch.randn(30 * 16000)
    encoder = load_encoder(str(source), output_norm=False).eval()
    reference = WhisperModel.from_pretrained(source, dtype=torch.float32).encoder.eval()
    mel = WhisperFeatureExtractor.from_pretrained(source)(wav.numpy(), sampling_rate=16000, return_tensors="pt")
    own_mel = encoder.log_mel(wav[None], torch.tensor([len(wav)]))
    torch.testing.assert_close(own_mel[..., :-2], mel.input_features[..., :-2], rtol=0, atol=1e-4)
    with torch.no_grad():
        theirs = reference(mel.input_features).last_hidden_state
        ours = encoder(wav[None], torch.tensor([len(wav)])).states
    assert (ours - theirs).abs().mean() < 1e-3 * theirs.abs().mean()


@pytest.mark.parametrize("kind", ["wavlm-large", "hubert-base"])
def test_filterbanks_in_place_of_the_convolutions(
    kind: str, ssl_sources: dict[str, str], wavs: list[torch.Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = load_encoder(ssl_sources[kind], features="fbank").eval()
    batch, _ = pad_wavs(wavs)
    with torch.no_grad():
        together = encoder(batch, lengths_of(wavs))
        for i, wav in enumerate(wavs):
            alone = encoder(wav[None], lengths_of([wav]))
            frames = int(alone.frame_lengths)
            assert frames == len(wav) // 320 == together.frame_lengths[i] == alone.states.shape[1]
            torch.testing.assert_close(together.states[i, :frames], alone.states[0], rtol=1e-4, atol=2e-5)
    assert all(p.requires_grad for p in encoder.model.feature_extractor.parameters())
    same = type(encoder).from_config(encoder.to_config()).eval()
    same.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(same(batch, lengths_of(wavs)).states, together.states)


def test_features_that_do_not_fit(ssl_sources: dict[str, str]) -> None:
    with pytest.raises(UserError, match="use cnn or fbank"):
        load_encoder(ssl_sources["wavlm-large"], features="mel")
    with pytest.raises(UserError, match="is a Whisper"):
        load_encoder("efficient_asr:mini_encoder", features="fbank")
