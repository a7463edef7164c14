from __future__ import annotations

import math

import pytest
import torch

from efficient_asr.data import pad_wavs
from efficient_asr.models.ctc import CTCModel
from efficient_asr.techniques.downsampling import Downsampler
from efficient_asr.utils.errors import UserError

CASES = [("signal", f) for f in (1.5, 2, 2.5, 3, 4, 7)] + [
    (t, f) for t in ("average", "convolutional") for f in (2, 3, 4)
]


@pytest.mark.parametrize("technique", ["none", "signal", "average", "convolutional"])
def test_factor_1_is_the_baseline_exactly(technique: str, tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    with torch.no_grad():
        baseline, lengths = tiny_ctc(*pad_wavs(wavs))
        tiny_ctc.frontend = Downsampler(technique, 1)
        log_probs, own_lengths = tiny_ctc(*pad_wavs(wavs))
    assert torch.equal(baseline, log_probs) and torch.equal(lengths, own_lengths)
    assert tiny_ctc.frontend.is_identity and not list(tiny_ctc.frontend.parameters())


def test_technique_none_is_the_identity_at_any_factor() -> None:
    assert Downsampler("none", 3).is_identity


@pytest.mark.parametrize(("technique", "factor"), CASES)
@pytest.mark.parametrize("samples", [1, 160, 161, 15999, 16000, 16001])
def test_lengths_and_padding(technique: str, factor: float, samples: int) -> None:
    torch.manual_seed(0)
    downsampler = Downsampler(technique, factor)
    wavs = torch.randn(2, 17000)
    wavs[1, samples:] = 0
    lengths = torch.tensor([17000, samples])
    with torch.no_grad():
        together, out = downsampler((wavs, lengths))
        alone, single = downsampler((wavs[1:, :samples], lengths[1:]))
    assert out.tolist() == downsampler.output_lengths(lengths).tolist()
    assert together.shape[1] == out[0] and single[0] == out[1]
    length = int(out[1])
    # The same sums of at most 161 products, accumulated in another order on some CPUs: a few units in the last place.
    tolerance = 16 * torch.finfo(torch.float32).eps * max(1.0, float(alone.abs().max()) if alone.numel() else 1.0)
    torch.testing.assert_close(together[1, :length], alone[0, :length], rtol=0, atol=tolerance)
    assert (together[1, length:] == 0).all()
    assert abs(float(out[0]) - 17000 / factor) <= 1 + (161 / factor if technique != "signal" else 0)


def test_signal_at_3_is_a_true_third_of_the_rate() -> None:
    """A tone at 1000 Hz must sit at 1000 Hz of a 16000/3 Hz signal, not of a 5333 Hz one."""
    samples = 96000
    t = torch.arange(samples, dtype=torch.float64) / 16000
    wav = torch.sin(2 * math.pi * 1000 * t).float()[None]
    out, lengths = Downsampler("signal", 3)((wav, torch.tensor([samples])))
    assert int(lengths) == samples // 3
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(samples // 3, dtype=torch.float64) * 3 / 16000).float()
    inner = slice(100, -100)
    torch.testing.assert_close(out[0, inner], expected[inner], rtol=0, atol=5e-3)


def test_average_is_the_mean_of_its_window() -> None:
    wav = torch.arange(40.0)[None]
    out, _ = Downsampler("average", 2)((wav, torch.tensor([40])))
    padded = torch.nn.functional.pad(wav[0], (2, 2))
    expected = torch.stack([padded[2 * i : 2 * i + 10].mean() for i in range(out.shape[1])])
    torch.testing.assert_close(out[0], expected)
    assert Downsampler("average", 4).kernel_size == 12 and Downsampler("average", 3).kernel_size == 10


def test_convolution_is_learned_and_can_start_as_a_lowpass() -> None:
    downsampler = Downsampler("convolutional", 2, convolution_init="lowpass")
    assert sum(p.numel() for p in downsampler.parameters()) == 162
    t = torch.arange(16000) / 16000
    low, high = torch.sin(2 * math.pi * 1000 * t), torch.sin(2 * math.pi * 6000 * t)
    out, lengths = downsampler((torch.stack([low, high]), torch.tensor([16000, 16000])))
    assert lengths.tolist() == [(16000 - 161) // 2 + 1] * 2
    power = out.detach().pow(2).mean(dim=1)
    assert float(power[0]) == pytest.approx(0.5, abs=0.02) and float(power[1]) < 1e-3
    out.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in downsampler.parameters())


def test_configuration_round_trip() -> None:
    for technique, factor in CASES:
        one = Downsampler(technique, factor)
        other = Downsampler.from_config(one.to_config())
        assert (other.technique, other.ratio, other.kernel_size) == (one.technique, one.ratio, one.kernel_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("avarage", 2), "Did you mean 'average'"),
        (("signal", 0.5), "at least 1"),
        (("signal", "2"), "at least 1"),
        (("signal", float("nan")), "at least 1"),
        (("average", 1.5), "needs a whole number"),
        (("convolutional", 2, None, "zeros"), "expected random or lowpass"),
        (("average", 2, 3), "downsampling_kernel: 3 is less than 4"),
        (("signal", 2, 81), "downsampling_kernel: 'signal' has none"),
        (("convolutional", 2, 2, "lowpass"), "downsampling_kernel: a lowpass needs 3 taps"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Downsampler(*arguments)
