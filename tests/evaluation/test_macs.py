from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import nn

from efficient_asr import load_transcriber
from efficient_asr.data import load_audio, write_manifest
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import score
from efficient_asr.evaluation.macs import count_macs, thop_available
from efficient_asr.models.encoders.ssl import SSLEncoder
from efficient_asr.models.encoders.whisper import WhisperEncoder

needs_thop = pytest.mark.skipif(not thop_available(), reason="thop cannot be imported on this Python (no distutils)")


def conv_lengths(samples: int, kernels: tuple, strides: tuple) -> list[int]:
    out = []
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
        out.append(samples)
    return out


def transformer_layer(frames: int, dim: int, ffn: int) -> int:
    return frames * (4 * dim * dim + 2 * dim * ffn) + 2 * frames * frames * dim


def ssl_closed_form(samples: int, config, wavlm: bool) -> int:
    """Convolutions, projection, positional convolution, layers; WavLM adds its gate (head_dim -> 8)."""
    lengths = conv_lengths(samples, config.conv_kernel, config.conv_stride)
    dims = [1, *config.conv_dim]
    total = sum(t * dims[i] * dims[i + 1] * k for i, (t, k) in enumerate(zip(lengths, config.conv_kernel, strict=True)))
    frames, dim = lengths[-1], config.hidden_size
    total += frames * config.conv_dim[-1] * dim
    # an even kernel with padding on both sides gives one frame more, which is cut off
    total += (frames + 1) * dim * (dim // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings
    total += config.num_hidden_layers * transformer_layer(frames, dim, config.intermediate_size)
    if wavlm:
        total += config.num_hidden_layers * frames * dim * 8
    return total


def whisper_encoder_closed_form(dim: int, layers: int, mels: int = 80, frames: int = 1500) -> int:
    convolutions = 2 * frames * dim * mels * 3 + frames * dim * dim * 3
    return convolutions + layers * transformer_layer(frames, dim, 4 * dim)


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def wav2vec2_base() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return SSLEncoder(Wav2Vec2Model(Wav2Vec2Config()), normalise_input=True)


def wavlm_large() -> nn.Module:
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=False,
    )  # fmt: skip
    return SSLEncoder(WavLMModel(config), normalise_input=True)


def whisper_network(dim: int, layers: int, heads: int):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Network

    return Network(
        WhisperConfig(d_model=dim, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * dim)
    )


class RawSSL(nn.Module):
    """transformers' own network under our counter, which runs on the meta device (ours asks for lengths' values)."""

    def __init__(self, encoder: SSLEncoder) -> None:
        super().__init__()
        norm = encoder.group_norm
        self.model = encoder.model
        if norm is not None:
            norm[0].frame_lengths = None

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        return self.model(wavs).last_hidden_state


def test_linear_convolution_and_matmul() -> None:
    assert count_macs(nn.Linear(3, 5), torch.zeros(2, 3)).macs == 30
    assert count_macs(nn.Conv1d(4, 6, 3, stride=2, groups=2), torch.zeros(1, 4, 11)).macs == 5 * 6 * 2 * 3
    assert count_macs(nn.ConvTranspose1d(4, 6, 3), torch.zeros(1, 4, 11)).macs == 11 * 4 * 6 * 3
    assert count_macs(torch.matmul, torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5, 6)).macs == 2 * 3 * 4 * 5 * 6
    assert (
        count_macs(torch.baddbmm, torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 5, 4)).macs
        == 2 * 3 * 5 * 4
    )


def test_output_is_passed_on_and_nothing_stays_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    before = list(model.state_dict())
    x = torch.ones(2, 3)
    counted = count_macs(model, x)
    assert torch.equal(counted.output, model(x))
    assert list(model.state_dict()) == before
    assert not any(hasattr(m, "total_ops") for m in model.modules())


def test_hooks_go_away_after_an_error() -> None:
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(3, 5), torch.zeros(2, 4))
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("shape", [(1, 2, 10, 8), (3, 4, 37, 16)])
def test_fused_attention_is_counted(shape: tuple) -> None:
    batch, heads, frames, dim = shape
    q = torch.randn(shape)
    counted = count_macs(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert counted.macs == 2 * batch * heads * frames * frames * dim


def test_inference_mode_hides_nothing() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.zeros(1, 9, 16)
    expected = transformer_layer(9, 16, 32)
    assert count_macs(layer, x).macs == expected
    with torch.inference_mode():
        assert count_macs(layer, x).macs == expected


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(3, 5), (2, 3), 30),
        (nn.Conv1d(4, 6, 3), (1, 4, 11), 9 * 6 * 4 * 3),
        (nn.LSTM(10, 16, batch_first=True), (2, 7, 10), 14 * 4 * 16 * 26),
        (nn.MultiheadAttention(16, 2, batch_first=True), None, 4 * 9 * 16 * 16 + 2 * 9 * 9 * 16),
    ],
)
def test_inference_mode_inside_the_function_hides_nothing(
    module: nn.Module, shape: tuple | None, expected: int
) -> None:
    @torch.inference_mode()
    def call() -> object:
        x = torch.zeros(shape or (1, 9, 16))
        return module(x) if shape else module(x, x, x)

    assert count_macs(call).macs == expected


def test_matrix_times_vector() -> None:
    assert count_macs(torch.mv, torch.zeros(3, 5), torch.zeros(5)).macs == 15
    assert count_macs(torch.dot, torch.zeros(5), torch.zeros(5)).macs == 5


@pytest.mark.parametrize("kind", ["wav2vec2-base", "wavlm-large"])
def test_the_adapter_costs_what_the_network_costs(kind: str, ssl_sources: dict[str, str]) -> None:
    """What is shown above for transformers' own forward holds for our layer-by-layer one."""
    from efficient_asr.models.encoders.load import load_encoder

    encoder = load_encoder(ssl_sources[kind]).eval()
    ours = count_macs(encoder, torch.randn(1, 9000), torch.tensor([9000]))
    theirs = count_macs(RawSSL(encoder), torch.randn(1, 9000))
    assert ours.macs == theirs.macs and ours.macs_thop == theirs.macs_thop


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_lstm(bidirectional: bool, packed: bool, batch: int) -> None:
    lstm = nn.LSTM(10, 16, 2, bidirectional=bidirectional, batch_first=True)
    x = torch.zeros(batch, 7, 10)
    lengths = [7] + [4] * (batch - 1)
    positions = sum(lengths) if packed else 7 * batch
    directions = 1 + bidirectional
    expected = positions * directions * 4 * 16 * ((10 + 16) + (16 * directions + 16))
    inputs = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True) if packed else x
    assert count_macs(lstm, inputs).macs == expected


@pytest.mark.parametrize("samples", [160000, 51234])
def test_wav2vec2_base_closed_form(samples: int) -> None:
    encoder = on_meta(wav2vec2_base)
    expected = ssl_closed_form(samples, encoder.model.config, wavlm=False)
    if samples == 160000:
        assert expected / 1e9 == pytest.approx(74.067, rel=1e-3)
    with torch.device("meta"):
        counted = count_macs(RawSSL(encoder), torch.zeros(1, samples))
    assert counted.macs == pytest.approx(expected, rel=5e-3)


def test_wavlm_large_closed_form() -> None:
    encoder = on_meta(wavlm_large)
    with torch.device("meta"):
        counted = count_macs(RawSSL(encoder), torch.zeros(1, 160000))
    assert counted.macs == pytest.approx(ssl_closed_form(160000, encoder.model.config, wavlm=True), rel=5e-3)


@needs_thop
def test_wavlm_large_at_factors_1_2_4_stands_in_the_published_ratios() -> None:
    """386.538 : 192.97 : 96.11, in thop's convention, at the padded length of an average batch of the paper."""
    encoder = on_meta(wavlm_large)
    samples, counts = 16 * 16000, []
    for factor in (1, 2, 4):
        with torch.device("meta"):
            counts.append(count_macs(RawSSL(encoder), torch.zeros(1, samples // factor)).macs_thop)
    assert counts[0] / counts[1] == pytest.approx(386.538 / 192.97, rel=0.01)
    assert counts[0] / counts[2] == pytest.approx(386.538 / 96.11, rel=0.01)


@pytest.mark.parametrize(("dim", "layers", "heads", "giga"), [(384, 4, 6, 18.469), (768, 12, 12, 172.081)])
def test_whisper_encoders_closed_form(dim: int, layers: int, heads: int, giga: float) -> None:
    expected = whisper_encoder_closed_form(dim, layers)
    assert expected / 1e9 == pytest.approx(giga, rel=1e-4)
    network = on_meta(lambda: whisper_network(dim, layers, heads))
    with torch.device("meta"):
        assert count_macs(network, torch.zeros(1, 80, 3000)).macs == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
def test_our_whisper_encoder_on_30_s() -> None:
    """The whole adapter, log-mel filters included, still within half a percent."""
    encoder = WhisperEncoder(whisper_network(384, 4, 6)).eval()
    samples = 30 * 16000
    counted = count_macs(encoder, torch.zeros(1, samples), torch.tensor([samples]))
    assert counted.macs == pytest.approx(whisper_encoder_closed_form(384, 4), rel=5e-3)


def decoder_closed_form(dim: int, layers: int, tokens: int, source: int, vocab: int) -> int:
    """Cached: each step attends to what came before; cross attention projects the source once."""
    total = layers * source * 2 * dim * dim
    for step in range(1, tokens + 1):
        self_attention = 4 * dim * dim + 2 * step * dim
        cross_attention = 2 * dim * dim + 2 * source * dim
        total += layers * (self_attention + cross_attention + 8 * dim * dim) + dim * vocab
    return total


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "vocab", "source"),
    [(48, 2, 2, 300, 60), pytest.param(768, 12, 12, 51865, 1500, marks=pytest.mark.slow)],
)
def test_whisper_cached_decoding_closed_form(dim: int, layers: int, heads: int, vocab: int, source: int) -> None:
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=dim, encoder_layers=1, decoder_layers=layers, encoder_attention_heads=heads, vocab_size=vocab,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * dim, decoder_ffn_dim=4 * dim, max_source_positions=source,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=2)
    tokens = 32
    mel = torch.zeros(1, 80, 2 * source)
    encoded = model.model.encoder(mel)
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "encoder_outputs": encoded}
    counted = count_macs(model.generate, input_features=mel, **options)
    expected = decoder_closed_form(dim, layers, tokens, source, vocab)
    if dim == 768:
        without_logits = decoder_closed_form(dim, layers, tokens, source, vocab=0)
        assert without_logits / 1e9 == pytest.approx(25.308, rel=1e-3)
    assert counted.macs == pytest.approx(expected, rel=5e-3)


@needs_thop
@pytest.mark.parametrize("kind", ["wavlm", "wav2vec2", "whisper", "lstm", "mixed"])
def test_thop_convention_agrees_with_thop(kind: str) -> None:
    import thop

    torch.manual_seed(0)
    x = torch.zeros(1, 8000)
    if kind in ("wavlm", "wav2vec2"):
        from conftest import TINY_SSL
        from transformers import Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

        classes = {"wavlm": (WavLMModel, WavLMConfig), "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config)}[kind]
        model = classes[0](classes[1](**TINY_SSL)).eval()
    elif kind == "whisper":
        model, x = whisper_network(32, 2, 2).eval(), torch.zeros(1, 80, 3000)
    elif kind == "lstm":
        model, x = nn.LSTM(10, 16, 2, bidirectional=True, batch_first=True), torch.zeros(2, 7, 10)
    else:
        model = nn.Sequential(
            nn.Conv1d(1, 4, 5, 2), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.AdaptiveAvgPool1d(3), nn.Softmax(-1)
        )
        model, x = model.eval(), torch.zeros(2, 1, 40)
    ours = count_macs(model, x).macs_thop
    theirs, _ = thop.profile(model, (x,), verbose=False)
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.real
@pytest.mark.slow
def test_counting_costs_under_a_tenth_of_an_evaluation(real_models: Path, real_data: Path) -> None:
    """Of one as users run it, timing included, with the smallest real encoder.

    What counting adds is found on every third utterance, with and without it in turn and the least disturbed of three each:
    whole evaluations, one after the other, differ by a tenth on a busy machine whether anything is counted or not.
    """
    from efficient_asr.evaluation.benchmark import Benchmark
    from efficient_asr.evaluation.evaluator import evaluate
    from efficient_asr.inference.ctc import CTCTranscriber
    from efficient_asr.models.ctc import CTCHead, CTCModel
    from efficient_asr.models.encoders.load import load_encoder
    from efficient_asr.text.labels import CharacterLabels

    labels = CharacterLabels.from_texts(["abcdefghijklmnopqrstuvwxyz'"])
    encoder = load_encoder(str(real_models / "whisper-tiny"), output_norm=False)
    transcriber = CTCTranscriber(CTCModel(nn.Identity(), encoder, CTCHead(384, len(labels), "none"), labels).eval())
    benchmark = Benchmark.from_manifest(real_data / "librispeech_test_other" / "manifest.jsonl")
    benchmark.rows = benchmark.rows.select(range(0, len(benchmark.rows), 4))
    start = time.perf_counter()
    evaluate(transcriber, benchmark, measure_macs=False, repeats=3)
    whole_s = time.perf_counter() - start

    def seconds(call: Callable[..., Any], *args: Any) -> float:
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start

    added_s = 0.0
    for row in benchmark.rows[::3]:
        wav, length = load_audio(row["audio"])[None], torch.ones(1)
        turns = [
            (seconds(transcriber.transcribe, wav, length), seconds(count_macs, transcriber.transcribe, wav, length))
            for _ in range(3)
        ]
        bare_s, counted_s = (min(times) for times in zip(*turns, strict=True))
        added_s += counted_s - bare_s
    assert 3 * added_s < 0.1 * whole_s


@pytest.mark.parametrize("padding", [None, "silence_cache"])
def test_macs_of_every_utterance_are_those_that_counting_it_gives(
    padding: str | None, wavs: list[torch.Tensor], tmp_path: Path
) -> None:
    """Utterances that cost the same are counted once."""
    rows = []
    for i, wav in enumerate([*wavs, *wavs, wavs[0][:9000], wavs[1][:9000]]):
        soundfile.write(tmp_path / f"{i}.wav", wav.numpy(), 16000, subtype="FLOAT")
        rows.append({"id": str(i), "audio": str(tmp_path / f"{i}.wav"), "duration": len(wav) / 16000, "text": "nine"})
    write_manifest(tmp_path / "test.jsonl", iter(rows))
    transcriber = load_transcriber("efficient_asr:mini_whisper_small", language="en", encoder_padding=padding)
    scored = score(transcriber, Benchmark.from_manifest(tmp_path / "test.jsonl", normaliser="plain"))
    records = list(scored)
    for record, row in zip(records, rows, strict=True):
        counted = count_macs(transcriber.transcribe, load_audio(row["audio"])[None]).macs
        assert record["macs_g"] * 1e9 == pytest.approx(counted, rel=1e-9)
    assert len({record["macs_g"] for record in records}) > 1
