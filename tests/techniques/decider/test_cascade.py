"""Cascades: identities at the ends, no dependence on batch mates, nothing encoded twice, saving and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.data import pad_wavs
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.ctc import CTCModel
from efficient_asr.techniques.decider.cascade import CascadeTranscriber
from efficient_asr.techniques.decider.network import Decider, LogMelDecider, Rule, SmallModelDecider
from efficient_asr.techniques.decider.router import Router, RouterInput
from efficient_asr.utils.errors import UserError

SHAPES = {"encoder": (2, 16), "large_encoder": (3, 32)}


def make_router(router_input: str) -> Router:
    torch.manual_seed(3)
    if router_input == "audio":
        return LogMelDecider(channels=[8], strides=[2])
    if router_input == "small_model":
        return SmallModelDecider(2, 16, 4, 8).eval()
    return Rule("entropy") if router_input == "transcript" else Decider(*SHAPES[router_input], [8], [2], router_input)


@pytest.fixture
def models(tiny_whispers: dict[str, str]) -> list[WhisperTranscriber]:
    return [WhisperTranscriber.from_source(tiny_whispers[name], "en") for name in ("small", "large")]


ORDERS = ("audio", "encoder", "transcript", "small_model", "large_encoder")


def middle(models: list[Any], router: Router, wavs: list[torch.Tensor]) -> float:
    """A threshold that sends about half of the utterances on."""
    cascade = CascadeTranscriber(models, [router], [math.inf])
    scores = sorted(t.details["router_scores"][0] for t in cascade.transcribe(*pad_wavs(wavs)))
    return (scores[1] + scores[2]) / 2


@pytest.mark.parametrize("router_input", ORDERS)
def test_the_ends_are_the_single_models(router_input: str, models: list[Any], wavs: list[torch.Tensor]) -> None:
    batch = pad_wavs(wavs)
    for threshold, number in ((math.inf, 0), (-math.inf, 1)):
        cascade = CascadeTranscriber(models, [make_router(router_input)], [threshold])
        found, expected = cascade.transcribe(*batch), models[number].transcribe(*batch)
        assert [t.text for t in found] == [t.text for t in expected] and any(t.text for t in found)
        assert {t.details["route"] for t in found} == {("small", "large")[number]}


@pytest.mark.parametrize("router_input", ORDERS)
@pytest.mark.parametrize("padding", [None, "silence_cache"])
def test_a_batch_is_split_and_put_together(
    router_input: str, padding: str | None, tiny_whispers: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    own = {} if padding is None else {"encoder_padding": padding, "padding_s": 0.1}
    models = [WhisperTranscriber.from_source(tiny_whispers[name], "en", **own) for name in ("small", "large")]
    wavs = [wav[: 9000 + 2000 * i] for i, wav in enumerate(wavs)]  # with room for silence behind them
    router = make_router(router_input)
    cascade = CascadeTranscriber(models, [router], [middle(models, router, wavs)])
    together = cascade.transcribe(*pad_wavs(wavs))
    routes = [t.details["route"] for t in together]
    assert sorted(routes) == ["large", "large", "small", "small"]
    for i, wav in enumerate(wavs):
        (alone,) = cascade.transcribe(wav[None], torch.ones(1))
        assert (alone.text, alone.details["route"]) == (together[i].text, routes[i])
        (single,) = models[("small", "large").index(routes[i])].transcribe(wav[None], torch.ones(1))
        assert alone.text == single.text


@pytest.mark.parametrize("router_input", ORDERS)
def test_what_lies_behind_an_utterance_is_not_heard(
    router_input: str, models: list[Any], wavs: list[torch.Tensor]
) -> None:
    cascade = CascadeTranscriber(models, [make_router(router_input)], [0.0])
    silent, wav_lens = pad_wavs(wavs)
    noisy = silent.clone()
    for i, wav in enumerate(wavs):
        noisy[i, len(wav) :] = torch.randn(silent.shape[1] - len(wav))
    assert not torch.equal(noisy, silent)
    found, expected = cascade.transcribe(noisy, wav_lens), cascade.transcribe(silent, wav_lens)
    assert [(t.text, t.details["router_scores"]) for t in found] == [
        (t.text, t.details["router_scores"]) for t in expected
    ]


@pytest.mark.parametrize("router_input", ["encoder", "large_encoder"])
def test_a_router_on_the_window_needs_a_window(router_input: str, tiny_whispers: dict[str, str]) -> None:
    """With states that end with the longest utterance of a batch, a mean over the window would depend on batch mates."""
    own = [
        WhisperTranscriber.from_source(tiny_whispers[name], "en", encoder_padding=0.1) for name in ("small", "large")
    ]
    with pytest.raises(UserError, match=r"needs the states of the whole window, but '(small|large)' encodes only own"):
        CascadeTranscriber(own, [make_router(router_input)], [0.0])
    unpadded = Decider(*SHAPES[router_input], [8], [2], router_input, frames="unpadded")
    assert CascadeTranscriber(own, [unpadded], [0.0]).routers == [unpadded]


@pytest.mark.parametrize("router_input", ORDERS)
def test_nothing_is_encoded_twice(router_input: str, models: list[Any], wavs: list[torch.Tensor]) -> None:
    router = make_router(router_input)
    cascade = CascadeTranscriber(models, [router], [middle(models, router, wavs)])
    rows = {"small": 0, "large": 0}
    for name, model in zip(rows, models, strict=True):

        def count(module: Any, args: Any, name: str = name) -> None:
            rows[name] += len(args[0])

        model.model.network.model.encoder.register_forward_pre_hook(count)
    cascade.transcribe(*pad_wavs(wavs))
    expected = {
        "audio": (2, 2),
        "encoder": (4, 2),
        "transcript": (4, 2),
        "small_model": (4, 2),
        "large_encoder": (2, 4),
    }
    assert tuple(rows.values()) == expected[router_input]


@pytest.mark.parametrize("router_input", ORDERS)
def test_macs_are_those_of_the_parts(router_input: str, models: list[Any], wavs: list[torch.Tensor]) -> None:
    one, router = (wavs[0][None], torch.ones(1)), make_router(router_input)
    small, large = (count_macs(model.transcribe, *one).macs for model in models)
    encoders = [count_macs(model.encode, *one).macs for model in models]
    heard = models[0].transcribe(*one)[0]
    inputs = RouterInput(one[0], torch.tensor([len(wavs[0])]), texts=[heard.text], details=[heard.details])
    if router_input in (*SHAPES, "small_model"):
        inputs.hidden_states = models[router_input == "large_encoder"].encode(*one, hidden_states=True).hidden_states
    own = count_macs(router, inputs).macs
    extra = {
        "encoder": (0, encoders[0]), "transcript": (0, small), "small_model": (0, small), "large_encoder": (encoders[1], 0),
        "audio": (0, 0),
    }[router_input]  # fmt: skip
    for threshold, expected in ((math.inf, small + own + extra[0]), (-math.inf, large + own + extra[1])):
        cascade = CascadeTranscriber(models, [router], [threshold])
        assert count_macs(cascade.transcribe, *one).macs == expected


def test_three_models_and_other_transcribers(models: list[Any], tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    chain = [CTCTranscriber(tiny_ctc), *models]
    routers = [Rule("duration"), make_router("encoder")]
    cascade = CascadeTranscriber(chain, routers, [1.05, -math.inf])
    found = cascade.transcribe(*pad_wavs(wavs))
    assert [t.details["route"] for t in found] == ["model_0", "model_2", "model_0", "model_2"]
    assert [len(t.details["router_scores"]) for t in found] == [1, 2, 1, 2]
    assert found[0].text == chain[0].transcribe(wavs[0][None], torch.ones(1))[0].text


def test_large_encoder_states_serve_the_next_router_too(models: list[Any], wavs: list[torch.Tensor]) -> None:
    """small, large, large again: the states that the first router computed are those that the second one looks at."""
    rows = []
    models[1].model.network.model.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    third = type(
        "Third", (Transcriber,), {"transcribe": lambda self, wavs, lens: [Transcript("third") for _ in lens]}
    )()
    first, second = make_router("large_encoder"), Decider(3, 32, [8], [2], "encoder")
    cascade = CascadeTranscriber([*models, third], [first, second], [-math.inf, math.inf])
    assert {t.details["route"] for t in cascade.transcribe(*pad_wavs(wavs))} == {"model_1"} and sum(rows) == len(wavs)


@pytest.mark.parametrize("router_input", ORDERS)
def test_a_saved_cascade_is_the_same(
    router_input: str, models: list[Any], tiny_whispers: dict[str, str], wavs: list[torch.Tensor], tmp_path: Path
) -> None:
    router = make_router(router_input)
    cascade = CascadeTranscriber(models, [router], [middle(models, router, wavs)], ["tiny", "base"])
    cascade.save(tmp_path / "model", list(tiny_whispers.values()), {"recipe": "decider"})
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    again = load_transcriber(str(moved), language="en")
    before, after = (c.transcribe(*pad_wavs(wavs)) for c in (cascade, again))
    assert [(t.text, t.details["route"]) for t in before] == [(t.text, t.details["route"]) for t in after]
    assert again.label == cascade.label and again.parameters_count() == cascade.parameters_count()
    assert not list(moved.rglob("*.bin")) and not list(moved.rglob("*.pt"))


def test_damaged_folders_are_explained(models: list[Any], tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    CascadeTranscriber(models, [make_router("encoder")], [0.0]).save(tmp_path / "m", list(tiny_whispers.values()))
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"thresholds": ["high"]}, "is damaged"),
        ({"routers": [{"type": "os.system", "config": {}}]}, "no technique declares"),
        (
            {"routers": [{"type": "models.ctc.CTCHead", "config": {"input_size": 2, "n_labels": 3}}]},
            "an entry of 'routers' is not a router",
        ),
        ({"routers": []}, "needs one router"),
        ({"version": 2}, "version 1"),
        ({"names": ["tiny"]}, "2 models, but 1 names"),
        ({"decoding": "fast"}, "is damaged"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_transcriber(str(tmp_path / "m"))


def test_mistakes_are_explained(models: list[Any], tiny_ctc: CTCModel) -> None:
    with pytest.raises(UserError, match="needs one router"):
        CascadeTranscriber(models, [], [])
    with pytest.raises(UserError, match="needs the encoder states of a Whisper"):
        CascadeTranscriber([CTCTranscriber(tiny_ctc), models[1]], [make_router("encoder")], [0.0])


def test_a_score_at_the_threshold_stays_with_the_small_model(models: list[Any], wavs: list[torch.Tensor]) -> None:
    router, batch = Rule("duration"), pad_wavs(wavs[:1])
    score = CascadeTranscriber(models, [router], [math.inf]).transcribe(*batch)[0].details["router_scores"][0]
    for threshold, route in ((score, "small"), (math.nextafter(score, -math.inf), "large")):
        (found,) = CascadeTranscriber(models, [router], [threshold]).transcribe(*batch)
        assert found.details["route"] == route
