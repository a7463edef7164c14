"""The decider's network against closed forms, its losses, and that padding does not matter."""

from __future__ import annotations

import math

import pytest
import torch

from efficient_asr.evaluation.macs import count_macs
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.parts import build, describe
from efficient_asr.models.whisper.decoding import compression_ratio
from efficient_asr.techniques.decider.network import (
    RULES,
    Decider,
    LogMelDecider,
    MaskedBatchNorm,
    Rule,
    SmallModelDecider,
    TranscriptDecider,
    decider_loss,
    transcript_statistics,
)
from efficient_asr.techniques.decider.router import RouterInput
from efficient_asr.utils.errors import UserError


def states_of(batch: int, frames: int, states: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(states, batch, frames, dim).unbind()


def closed_form_parameters(states: int, dim: int, channels: list[int]) -> int:
    total = states
    for inputs, outputs in zip([dim, *channels], channels, strict=False):
        total += 3 * inputs * outputs + 3 * outputs * outputs + inputs * outputs + 3 * 2 * outputs
    return total + channels[-1] + 1


def closed_form_macs(dim: int, channels: list[int], strides: list[int], frames: int) -> int:
    """Convolutions and the last layer; the weighted sum of states multiplies elementwise and counts as none."""
    total = 0
    for inputs, outputs, stride in zip([dim, *channels], channels, strides, strict=False):
        frames = (frames - 1) // stride + 1
        total += frames * (3 * inputs * outputs + 3 * outputs * outputs + inputs * outputs)
    return total + channels[-1]


def test_size_on_whisper_small() -> None:
    decider = Decider(13, 768)
    parameters = sum(p.numel() for p in decider.parameters())
    assert parameters == closed_form_parameters(13, 768, [256] * 3)
    assert parameters / 1e6 == pytest.approx(1.905, abs=0.0005)


def test_macs_on_whisper_small_for_a_window() -> None:
    decider, inputs = Decider(13, 768).eval(), RouterInput(torch.zeros(1, 0), torch.tensor([480000]))
    inputs.hidden_states = states_of(1, 1500, 13, 768)
    with torch.no_grad():
        macs = count_macs(decider, inputs).macs
    assert macs == closed_form_macs(768, [256] * 3, [2, 3, 3], 1500)
    assert macs / 1e9 == pytest.approx(0.89, abs=0.01)


def test_weights_start_as_in_the_paper() -> None:
    weights = Decider(200, 4, [2], [1]).weights
    assert (
        float(weights.min()) >= 0 and float(weights.max()) < 1 and float(weights.mean()) == pytest.approx(0.5, abs=0.1)
    )


def test_the_weighted_sum_is_not_normalised() -> None:
    decider, hidden = Decider(3, 4, [8], [1], frames="padded").eval(), states_of(1, 10, 3, 4)
    seen = []
    decider.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    decider(RouterInput(torch.zeros(1, 0), torch.tensor([10]), hidden))
    expected = sum(w * h for w, h in zip(decider.weights, hidden, strict=True)).transpose(1, 2)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.37])
def test_own_frames_do_not_see_the_padding(seconds: float) -> None:
    decider = Decider(3, 8, [16, 16], [2, 3], frames="unpadded").double().eval()
    hidden = tuple(states.double() for states in states_of(2, 100, 3, 8))
    samples = torch.tensor([round(16000 * seconds), 32000])
    both = decider(RouterInput(torch.zeros(2, 0), samples, hidden))
    frames = (int(samples[0]) // 160 + 1) // 2
    alone = decider(RouterInput(torch.zeros(1, 0), samples[:1], tuple(h[:1, :frames] for h in hidden)))
    torch.testing.assert_close(both[:1], alone)


def test_half_precision_trains() -> None:
    decider, hidden = Decider(3, 8, [16], [2]).train(), states_of(2, 100, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = decider(RouterInput(torch.zeros(2, 0), torch.tensor([32000, 16000]), hidden))
    found.float().sum().backward()
    assert found.isfinite().all() and all(p.grad is not None for p in decider.parameters() if p.requires_grad)


def test_the_window_is_seen_whole() -> None:
    decider, hidden = Decider(2, 4, [8], [2], frames="padded").eval(), states_of(1, 40, 2, 4)
    whole = decider(RouterInput(torch.zeros(1, 0), torch.tensor([1600]), hidden))
    changed = tuple(torch.cat([h[:, :30], h[:, 30:] + 5], dim=1) for h in hidden)
    assert not torch.allclose(whole, decider(RouterInput(torch.zeros(1, 0), torch.tensor([1600]), changed)))


def test_log_mel_decider_does_not_depend_on_batch_mates(wavs: list[torch.Tensor]) -> None:
    decider = LogMelDecider(channels=[8, 8], strides=[2, 3]).eval()
    lengths = torch.tensor([len(wav) for wav in wavs])
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    together = decider(RouterInput(batch, lengths))
    alone = torch.cat([decider(RouterInput(wav[None], torch.tensor([len(wav)]))) for wav in wavs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "router",
    [
        Decider(3, 8, [4], [2]),
        LogMelDecider(channels=[4], strides=[2]),
        Rule("entropy"),
        TranscriptDecider(4),
        SmallModelDecider(3, 8, 2, 4),
    ],
    ids=type,
)
def test_routers_can_be_described_and_built(router: torch.nn.Module) -> None:
    again = build(describe(router), "router")
    assert type(again) is type(router) and again.to_config() == router.to_config()
    again.load_state_dict(router.state_dict())


DETAILS = [
    {"avg_logprob": -0.1, "entropy": 0.2, "tokens": 4, "min_logprob": -0.3},
    {"avg_logprob": -0.9, "entropy": 1.5, "tokens": 18, "min_logprob": -4.0},
]
SAID = ["turn on the light", "no no no no no no no no no no no no no no no no no no"]


def small_model_inputs(rows: list[int], frames: int = 120) -> RouterInput:
    hidden = tuple(states[rows, :frames].double() for states in states_of(2, 120, 3, 8))
    lengths = torch.tensor([16000, 32000])[rows]
    return RouterInput(torch.zeros(len(rows), 0), lengths, hidden, [SAID[i] for i in rows], [DETAILS[i] for i in rows])


def test_the_decider_on_the_small_model_does_not_see_padding_or_batch_mates() -> None:
    decider = SmallModelDecider(3, 8, 2, 4).double().eval()
    both = decider(small_model_inputs([0, 1]))
    torch.testing.assert_close(both[:1], decider(small_model_inputs([0], frames=50)))
    torch.testing.assert_close(both[1:], decider(small_model_inputs([1], frames=100)))


@pytest.mark.parametrize("change", ["states", "min_logprob", "text"])
def test_the_decider_on_the_small_model_uses_what_the_one_on_transcripts_does_not(change: str) -> None:
    torch.manual_seed(0)
    decider, inputs = SmallModelDecider(3, 8, 2, 16).double().eval(), small_model_inputs([0, 1])
    before = decider(inputs)
    if change == "states":
        inputs.hidden_states = tuple(h.flip(-1) for h in inputs.hidden_states)
    elif change == "min_logprob":
        inputs.details = [details | {"min_logprob": -9.0} for details in DETAILS]
    else:  # the same compression ratio would not tell these apart from words that are said once
        inputs.texts = ["a b a b", SAID[1]]
    assert not torch.allclose(before, decider(inputs))


def test_the_decider_on_the_small_model_explains_records_without_the_least_likely_token() -> None:
    inputs = small_model_inputs([0])
    inputs.details = [{key: value for key, value in DETAILS[0].items() if key != "min_logprob"}]
    with pytest.raises(UserError, match="reports min_logprob"):
        SmallModelDecider(3, 8, 2, 4).double().eval()(inputs)


def test_rules_rank_hard_utterances_higher() -> None:
    details = [{"avg_logprob": -0.1, "entropy": 0.2, "tokens": 4}, {"avg_logprob": -0.9, "entropy": 1.5, "tokens": 18}]
    texts = ["turn on the light", "no no no no no no no no no no no no no no no no no no"]
    inputs = RouterInput(torch.zeros(2, 0), torch.tensor([16000, 64000]), None, texts, details)
    for rule in RULES:
        scores = Rule(rule)(inputs)
        assert scores[1] > scores[0], rule
    assert Rule("duration")(inputs).tolist() == [1.0, 4.0]
    assert Rule("avg_logprob")(inputs).tolist() == pytest.approx([0.1, 0.9])
    assert Rule("sum_logprob")(inputs).tolist() == pytest.approx([0.5, 17.1])


def test_losses_against_closed_forms() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    gains = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    softplus = [math.log1p(math.exp(-0.3)), math.log1p(math.exp(-1.2)), math.log1p(math.exp(2.0))]
    assert float(decider_loss(logits, gains)) == pytest.approx(sum(softplus) / 3)
    assert float(decider_loss(logits, gains, positive_weight=5.0)) == pytest.approx(
        (5 * softplus[0] + softplus[1] + softplus[2]) / 3
    )
    l1 = [0.5 * 0.7**2, 1.2 - 0.5, 4.0 - 0.5]
    assert float(decider_loss(logits, gains, "gain")) == pytest.approx(sum(l1) / 3)
    assert float(decider_loss(logits, gains, "gain", 2.0)) == pytest.approx((2 * l1[0] + l1[1] + l1[2]) / 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decider(2, 4, router_input="encodr"), "Did you mean 'encoder'"),
        (lambda: Decider(2, 4, frames="all"), "not padded or unpadded"),
        (lambda: Decider(2, 4, [8, 8], [2]), "equally long lists of positive numbers"),
        (lambda: Rule("entropie"), "Did you mean 'entropy'"),
        (
            lambda: Rule("entropy")(RouterInput(torch.zeros(1, 0), torch.ones(1), None, ["a"], [{}])),
            "does not report entropy",
        ),
    ],
)
def test_mistakes_are_explained(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_masked_batch_norm_is_torchs_without_padding() -> None:
    torch.manual_seed(0)
    ours, theirs, x = MaskedBatchNorm(3), torch.nn.BatchNorm1d(3), 2 + torch.randn(4, 3, 5)
    whole = torch.ones(4, 1, 5, dtype=torch.bool)
    for _ in range(3):
        torch.testing.assert_close(ours(x, whole), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, whole), theirs(x))


def test_masked_batch_norm_does_not_see_padding_and_takes_a_batch_of_one() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 3, 5), torch.tensor([[[True] * 5], [[True, True, False, False, False]]])
    found = MaskedBatchNorm(3)(x, mask)
    expected = MaskedBatchNorm(3)(torch.where(mask, x, 100.0), mask)
    torch.testing.assert_close(found[:, :, :2], expected[:, :, :2])
    alone = MaskedBatchNorm(3)(x[:1, :, :1], mask[:1, :, :1])
    torch.testing.assert_close(alone, x[:1, :, :1] / (1 + 1e-5) ** 0.5)


def test_a_training_batch_of_one_is_possible() -> None:
    details = [{"avg_logprob": -0.1, "entropy": 0.2, "tokens": 4}]
    score = TranscriptDecider(4).train()(RouterInput(torch.zeros(1, 0), torch.tensor([16000]), None, ["a b"], details))
    score.sum().backward()
    assert score.isfinite().all()


def test_the_network_is_its_closed_form() -> None:
    """Convolutions, batch norms, shortcuts and rectifiers in float64; then the mean over the real frames, and a linear layer."""
    decider = Decider(2, 6, [4, 5], [2, 3], frames="unpadded").double().eval()
    for module in decider.modules():
        if isinstance(module, MaskedBatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_()
            module.running_var.uniform_(0.5, 2.0)

    def norm(module: MaskedBatchNorm, x: torch.Tensor) -> torch.Tensor:
        values = (module.running_mean, module.running_var, module.weight, module.bias)
        return torch.nn.functional.batch_norm(x, *values, eps=module.eps)

    states = [state.double() for state in states_of(1, 60, 2, 6)]
    for samples in (12 * 320, 31 * 320, 60 * 320):
        frames = int(encoder_frames(torch.tensor([samples])))
        x = sum(w * state[:, :frames] for w, state in zip(decider.weights, states, strict=True)).transpose(1, 2)
        for block in decider.blocks:
            inner = norm(block.norm2, block.conv2(torch.relu(norm(block.norm1, block.conv1(x)))))
            x = torch.relu(inner + norm(block.shortcut_norm, block.shortcut(x)))
        expected = decider.linear(x.mean(dim=2)).squeeze(1)
        found = decider(RouterInput(None, torch.tensor([samples]), tuple(states)))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_statistics_of_a_transcript_by_hand() -> None:
    details = [{"avg_logprob": -0.5, "entropy": 0.7, "tokens": 9}, {"avg_logprob": -1.0, "entropy": 2.0, "tokens": 0}]
    texts = ["one two three", ""]
    found = transcript_statistics(
        RouterInput(None, torch.tensor([48000, 800]), None, texts, details), torch.device("cpu")
    )
    ratios = [compression_ratio(text) for text in texts]
    expected = [
        [-0.5, math.log1p(0.5 * 10), 0.7, math.log1p(9), 3.0, 3.0, ratios[0]],
        [-1.0, math.log1p(1.0), 2.0, 0.0, 0.05, 0.0, ratios[1]],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_log_mel_decider_scales_its_features() -> None:
    decider = LogMelDecider(channels=[4], strides=[2]).eval()
    inputs = RouterInput(0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000]))
    scores = []
    for weight in (0.5, 2.0):
        decider.weights.data.fill_(weight)
        scores.append(float(decider(inputs)))
    assert scores[0] != scores[1]
