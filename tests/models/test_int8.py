"""int8 layers: closed forms, rows that do not depend on each other, MACs, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.data import pad_wavs
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.models.int8 import LEVELS, RowWise, WeightOnly, quantise
from efficient_asr.models.whisper.new import build_whisper
from efficient_asr.utils.errors import UserError

MINI = "efficient_asr:mini_whisper_large"
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="needs FBGEMM, which this CPU does not have"
)


@pytest.fixture
def linear() -> torch.nn.Linear:
    return torch.nn.Linear(64, 96)


def test_weight_only_is_the_product_with_rounded_weights(linear: torch.nn.Linear) -> None:
    layer, x = WeightOnly(linear), torch.randn(2, 3, 64)
    weights = layer.weight.double() * layer.scale.double()[:, None]
    assert layer.weight.abs().max() <= 127
    error = (weights - linear.weight.double()).abs()
    assert (error <= 0.51 * layer.scale.double()[:, None]).all()
    exact = x.bfloat16().double() @ weights.T
    found = layer(x) - linear.bias
    assert (found - exact).abs().max() < 2**-7 * exact.abs().max()  # bfloat16 has 8 bits


def test_row_wise_is_the_product_of_rounded_numbers(linear: torch.nn.Linear) -> None:
    layer, x = RowWise(linear), torch.randn(2, 3, 64) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    scale = linear.weight.double().abs().amax(1) / 127
    weights = (linear.weight.double() / scale[:, None]).round() * scale[:, None]
    largest = x.double().abs().amax(-1, keepdim=True)
    exact = (x.double() / largest * LEVELS).round() / LEVELS * largest @ weights.T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(RowWise(torch.nn.Linear(4, 8, bias=False))(torch.zeros(1, 4)), torch.zeros(1, 8))


@pytest.mark.parametrize("kind", [WeightOnly, RowWise])
def test_a_row_does_not_depend_on_the_others(kind: type, linear: torch.nn.Linear) -> None:
    layer, x = kind(linear), torch.randn(9, 64)
    x[4] *= 100
    together = layer(x)
    for row in range(len(x)):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_layers_that_the_kernel_cannot_read_stay_in_float() -> None:
    """It reads past the end of rows whose length is not a multiple of 16."""
    whisper = build_whisper(["one two"], d_model=24, heads=2, window_s=2.0, max_tokens=8)
    quantise(whisper.network, "decoder-int8")
    kinds = {type(child) for child in whisper.network.model.decoder.layers.modules()}
    assert torch.nn.Linear in kinds and WeightOnly in kinds  # fc2 has 96 inputs, the others 24
    assert not hasattr(whisper.network.model.decoder.layers[0].self_attn, "qkv_proj")


def test_adapters_are_merged_first() -> None:
    peft = pytest.importorskip("peft")
    network = build_whisper(["one two"], d_model=32, heads=2, window_s=2.0, max_tokens=8).network
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), network)
    with pytest.raises(UserError, match="needs a model without adapters"):
        quantise(network, "decoder-int8")


def test_no_weight_is_lost_from_the_count() -> None:
    plain, int8 = (load_transcriber(MINI, quantise=mode) for mode in (None, "int8"))
    assert int8.parameters_count() == plain.parameters_count()


@pytest.mark.parametrize("mode", ["decoder-int8", "encoder-int8", "int8"])
def test_quantised_models_write_what_the_float_model_writes(mode: str, wavs: list[torch.Tensor]) -> None:
    plain, int8 = load_transcriber(MINI, language="en"), load_transcriber(MINI, language="en", quantise=mode)
    texts = [t.text for t in plain.transcribe(*pad_wavs(wavs))]
    found = int8.transcribe(*pad_wavs(wavs))
    same = sum(a == b.text for a, b in zip(texts, found, strict=True))
    assert same >= len(texts) - 1 and int8.label == mode
    alone = [int8.transcribe(wav[None])[0] for wav in wavs]
    assert [t.text for t in alone] == [t.text for t in found]
    beams = load_transcriber(MINI, language="en", quantise=mode, num_beams=2)
    assert beams.transcribe(wavs[0][None])[0].text


def test_macs_are_those_of_the_float_model(wavs: list[torch.Tensor]) -> None:
    plain, int8 = (load_transcriber(MINI, language="en", max_new_tokens=3, quantise=q) for q in (None, "int8"))
    assert (
        count_macs(lambda: int8.transcribe(wavs[0][None])).macs
        == count_macs(lambda: plain.transcribe(wavs[0][None])).macs
    )


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantise: 'int4' is invalid"):
        load_transcriber(MINI, quantise="int4")
    transcriber = load_transcriber(MINI, quantise="decoder-int8")
    with pytest.raises(UserError, match="runs on the CPU only"):
        transcriber.to("cuda")
    with pytest.raises(UserError, match="a quantised model"):
        transcriber.model.save(tmp_path / "model")
    with pytest.raises(UserError, match="not an option of CTC models"):
        load_transcriber("efficient_asr:mini_downsampled", quantise="int8")
