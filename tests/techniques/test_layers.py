"""Layer removal, layer drop and early exit on every kind of encoder."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from efficient_asr.data import pad_wavs
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.techniques.downsampling import Downsampler
from efficient_asr.techniques.early_exit import heads as early_exit
from efficient_asr.techniques.early_exit.heads import NEVER, RULES, ExitHeads, _Decisions
from efficient_asr.techniques.layer_drop import LayerDrop
from efficient_asr.techniques.layer_removal import choose_layers, keep_layers, layer_redundancies, parse_choice
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError, exit_code

KINDS = ("whisper", "wav2vec2-base", "hubert-base", "wavlm-base", "wavlm-large")
LABELS = CharacterLabels.from_texts(["abcdefghij"])


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, ssl_sources: dict[str, str]) -> CTCModel:
    """A CTC model of three layers."""
    torch.manual_seed(3)
    if request.param == "whisper":
        encoder = new_whisper_encoder(d_model=32, layers=3, heads=2)
    else:
        encoder = load_encoder(ssl_sources[request.param])
    for layer in encoder.layers:  # random networks hardly change their input: make layers differ
        for parameter in layer.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    head = CTCHead(encoder.hidden_size, len(LABELS), "feedforward", neurons=16)
    return CTCModel(torch.nn.Identity(), encoder, head, LABELS).eval()


def with_exits(model: CTCModel, layers: list[int], rule: str = "none", threshold: float | None = None) -> CTCModel:
    """The same model with heads that start as copies of its own, then go their own ways."""
    heads = ExitHeads([CTCHead.from_config(model.head.config) for _ in layers], layers, rule, threshold)
    heads.load_state_dict(heads.init_from(model.head))
    torch.manual_seed(5)
    for head in heads.heads[:-1]:
        for parameter in head.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return CTCModel(model.frontend, model.encoder, heads, model.labels).eval()


def outputs(model: CTCModel, wavs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(*pad_wavs(wavs))


def hidden(model: CTCModel, wavs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.encoder(*model.apply_frontend(*pad_wavs(wavs)), output_hidden_states=True).hidden_states


# ------------------------------------------------------------ layer removal


def test_all_layers_are_the_baseline_exactly(model: CTCModel, wavs: list[torch.Tensor]) -> None:
    before = outputs(model, wavs)
    keep_layers(model.encoder, choose_layers(model.encoder, "all"))
    assert model.encoder.num_layers == 3
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, wavs), strict=True))


@pytest.mark.parametrize("kept", [[1], [1, 2], [2, 3], [3], [1, 3]])
def test_kept_layers_compute_what_they_would_alone(model: CTCModel, wavs: list[torch.Tensor], kept: list[int]) -> None:
    """The cut network equals the whole one whose other layers are skipped; its parameters are gone, from the file too."""
    single = wavs[:1]
    with torch.no_grad():
        samples, lengths = model.apply_frontend(*pad_wavs(single))
        state = model.encoder.begin(samples, lengths)
        if model.encoder.first_droppable_layer and kept[0] != 1:  # WavLM's bias comes from its first layer
            state.position_bias = model.encoder.run_layer(0, state).position_bias
        for i in kept:
            state = model.encoder.run_layer(i - 1, state)
        logits, _ = model.head(model.encoder.end(state), state.frame_lengths)
    before = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.encoder.layers[1].parameters())
    keep_layers(model.encoder, kept)
    log_probs, _ = outputs(model, single)
    torch.testing.assert_close(log_probs, logits.log_softmax(dim=-1), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == before - (3 - len(kept)) * layer


def test_labels_say_what_is_in_a_model(model: CTCModel) -> None:
    assert (model.technique, model.label) == ("none", "baseline")
    model.frontend = Downsampler("average", 2)
    model.history["layer_removal"] = {"label": "first_2", "kept_layers": [1, 2]}
    assert (model.technique, model.label) == ("downsampling + layer_removal", "average x2 + first_2")
    exits = with_exits(model, [3], "entropy", 0.5)
    assert (exits.technique, exits.label) == ("downsampling + early_exit", "average x2 + entropy 0.5")
    model.frontend, model.history, model.encoder = Downsampler("none"), {}, LayerDrop(model.encoder, 0.25)
    assert (model.technique, model.label) == ("layer_drop", "layerdrop 0.25")


def test_a_cut_model_is_saved_and_loaded(model: CTCModel, wavs: list[torch.Tensor], tmp_path) -> None:
    keep_layers(model.encoder, [2, 3])
    model.history["layer_removal"] = {"kept_layers": [2, 3], "of_layers": 3}
    model.save(tmp_path / "model")
    loaded = CTCModel.load(tmp_path / "model")
    assert loaded.encoder.num_layers == 2 and loaded.history == model.history
    assert torch.equal(outputs(model, wavs)[0], outputs(loaded, wavs)[0])


def test_macs_fall_as_the_closed_form_says() -> None:
    """A layer of T frames and d dimensions: 4Td² projections, 2T²d attention, 8Td² feed-forward."""
    torch.manual_seed(0)
    encoder, wav, d = new_whisper_encoder(d_model=32, layers=24, heads=2), torch.randn(1, 32000), 32
    length = torch.tensor([32000])
    frames = int(encoder.frame_lengths(length))
    macs = {}
    for n in (24, 18, 12, 5):
        keep_layers(encoder.eval(), list(range(1, n + 1)))
        macs[n] = count_macs(encoder, wav, length).macs
    one = 12 * frames * d * d + 2 * frames * frames * d
    assert [macs[24] - macs[n] for n in (18, 12, 5)] == [6 * one, 12 * one, 19 * one]


def test_choices() -> None:
    encoder = new_whisper_encoder(d_model=16, layers=6, heads=2)
    wanted = {
        "4": [1, 2, 3, 4], 4: [1, 2, 3, 4], "first_2": [1, 2], "last 3": [4, 5, 6], "every_2": [1, 3, 5], "every_5": [1, 6],
        "all": [1, 2, 3, 4, 5, 6], "least_redundant_6": [1, 2, 3, 4, 5, 6],
    }  # fmt: skip
    assert {choice: choose_layers(encoder, choice) for choice in wanted} == wanted
    assert choose_layers(encoder, [6, 1]) == [1, 6] and choose_layers(encoder, None) == wanted["all"]


@pytest.mark.parametrize(
    "bad", [0, 7, "7", "half", "first_0", "last", "-1", [], [0], [1, 1], [7], ["1"], 2.5, "every_2_3"]
)
def test_choices_that_are_none(bad: object) -> None:
    with pytest.raises(UserError, match="kept_layers: "):
        parse_choice(bad, 6)


def test_redundancy_is_the_mean_cosine_over_real_frames(model: CTCModel, wavs: list[torch.Tensor]) -> None:
    together = layer_redundancies(model.encoder, [model.apply_frontend(*pad_wavs(wavs))])
    alone, frames = torch.zeros(3, dtype=torch.float64), 0
    for wav in wavs:
        states = [h[0].double() for h in hidden(model, [wav])]
        length = len(states[0])
        alone += torch.stack([torch.cosine_similarity(a, b, dim=-1).sum() for a, b in itertools.pairwise(states)])
        frames += length
    torch.testing.assert_close(together, alone / frames, rtol=0, atol=1e-5)


def test_the_layer_that_does_nothing_goes_first(wavs: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    encoder = new_whisper_encoder(d_model=32, layers=4, heads=2)
    for layer in encoder.layers:
        for parameter in layer.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    for parameter in encoder.layers[1].parameters():
        parameter.data.zero_()
    batch, wav_lens = pad_wavs(wavs)
    lengths = (wav_lens * batch.shape[1]).round().long()
    assert choose_layers(encoder, "least_redundant_3", [(batch, lengths)]) == [1, 3, 4]


# ------------------------------------------------------------ layer drop


def test_drop_of_0_is_the_baseline_exactly(model: CTCModel, wavs: list[torch.Tensor]) -> None:
    before = outputs(model, wavs)[0]
    model.encoder = LayerDrop(model.encoder, 0.0)
    assert torch.equal(before, outputs(model, wavs)[0])


@pytest.mark.parametrize("seed", range(4))
def test_dropped_layers_do_not_depend_on_batch_mates(model: CTCModel, wavs: list[torch.Tensor], seed: int) -> None:
    model.encoder = LayerDrop(model.encoder, 0.5, seed)
    together, lengths = outputs(model, wavs)
    for row, (wav, length) in enumerate(zip(wavs, lengths.tolist(), strict=True)):
        alone, own = outputs(model, [wav])
        assert int(own) == length
        torch.testing.assert_close(together[row, :length], alone[0, :length], rtol=0, atol=1e-5)


def test_all_layers_run_in_training_and_the_first_ones_always(wavs: list[torch.Tensor]) -> None:
    """In training, the LayerDrop of the checkpoint decides, not the one of the evaluation."""
    encoder = new_whisper_encoder(d_model=16, layers=6, heads=2)
    batch, lengths = pad_wavs(wavs)[0], torch.tensor([len(wav) for wav in wavs])
    dropping = LayerDrop(encoder, 0.9, 1)
    with torch.no_grad():
        assert not torch.equal(dropping.eval()(batch, lengths).states, encoder.eval()(batch, lengths).states)
        trained = []
        for each in (dropping.train(), encoder.train()):
            torch.manual_seed(0)  # of the dropout
            trained.append(each(batch, lengths).states)
        assert torch.equal(*trained)
    dropping.first_droppable_layer = 2
    assert dropping.draw(torch.arange(100, 200))[:, :2].all() and not dropping.draw(torch.arange(100, 200))[:, 2:].all()


def test_drop_saves_and_follows_the_seed() -> None:
    encoder = new_whisper_encoder(d_model=16, layers=12, heads=2)
    lengths = torch.arange(1000, 3000)
    drawn = LayerDrop(encoder, 0.3, 1).draw(lengths)
    assert torch.equal(drawn, LayerDrop(encoder, 0.3, 1).draw(lengths))
    assert not torch.equal(drawn, LayerDrop(encoder, 0.3, 2).draw(lengths))
    assert float(drawn.float().mean()) == pytest.approx(0.7, abs=0.01)
    for bad in (1.0, -0.1, True, "0.5"):
        with pytest.raises(UserError, match="test_layerdrop"):
            LayerDrop(encoder, bad)


# ------------------------------------------------------------ early exit


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_that_never_exits_is_the_baseline_exactly(
    model: CTCModel, wavs: list[torch.Tensor], rule: str
) -> None:
    before, lengths = outputs(model, wavs)
    exits = with_exits(model, [1, 2, 3], rule, None)
    log_probs, own = outputs(exits, wavs)
    assert torch.equal(before, log_probs) and torch.equal(lengths, own)
    with torch.no_grad():
        assert [d["exit_layer"] for d in exits.recognise(*pad_wavs(wavs)).details] == [3] * len(wavs)


ALWAYS = {"entropy": 100.0, "similarity": -2.0, "confidence": -100.0, "agreement": 1.0}


@pytest.mark.parametrize(("rule", "layer"), [("entropy", 1), ("similarity", 1), ("confidence", 1), ("agreement", 2)])
def test_an_exit_equals_the_model_cut_there(model: CTCModel, wavs: list[torch.Tensor], rule: str, layer: int) -> None:
    """Agreement needs two heads, so nobody leaves at the first."""
    exits = with_exits(model, [1, 2, 3], rule, ALWAYS[rule])
    with torch.no_grad():
        reading = exits.recognise(*pad_wavs(wavs))
    assert {d["exit_layer"] for d in reading.details} == {layer}
    model.head = exits.head.heads[layer - 1]
    keep_layers(model.encoder, list(range(1, layer + 1)))
    assert torch.equal(reading.logits.log_softmax(dim=-1), outputs(model, wavs)[0])


def middle_threshold(model: CTCModel, wavs: list[torch.Tensor], rule: str, patience: int) -> float:
    """A threshold at which some leave and some stay, at the first head where the rule lets anyone leave."""

    def plain(fn, *args):
        return fn(*args), 0

    with torch.no_grad():
        found = [model.head.trace(model.encoder, *model.apply_frontend(*pad_wavs([wav])), plain) for wav in wavs]
    if rule == "agreement":
        values = sorted(utterance[1][rule] for utterance in found)
        return (values[0] + values[1]) / 2
    worst = max if rule == "entropy" else min
    values = sorted(worst(one[rule] for one in utterance[:patience]) for utterance in found)
    return (values[1] + values[2]) / 2


@pytest.mark.parametrize(
    ("rule", "patience"),
    [("agreement", 1), *((rule, patience) for rule in ("entropy", "similarity", "confidence") for patience in (1, 2))],
)
def test_batches_leave_as_single_utterances_do(
    model: CTCModel, wavs: list[torch.Tensor], rule: str, patience: int
) -> None:
    exits = with_exits(model, [1, 2, 3], rule)
    exits.head.set_rule(rule, middle_threshold(exits, wavs, rule, patience), patience)
    with torch.no_grad():
        together = exits.recognise(*pad_wavs(wavs))
        for row, wav in enumerate(wavs):
            alone = exits.recognise(*pad_wavs([wav]))
            assert alone.details[0] == together.details[row]
            length = int(alone.frame_lengths)
            assert length == int(together.frame_lengths[row])
            torch.testing.assert_close(together.logits[row, :length], alone.logits[0, :length], rtol=0, atol=1e-5)
    assert len({d["exit_layer"] for d in together.details}) > 1, "a test where all leave together shows nothing"


def test_macs_of_an_exit_are_those_of_what_ran(wavs: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    encoder = new_whisper_encoder(d_model=32, layers=3, heads=2)
    head = CTCHead(32, len(LABELS), "none")
    model = with_exits(CTCModel(torch.nn.Identity(), encoder, head, LABELS).eval(), [1, 2, 3])
    batch, wav_lens = pad_wavs(wavs[:1])
    samples, lengths = model.apply_frontend(batch, wav_lens)
    frames = int(encoder.frame_lengths(lengths))
    begin = count_macs(encoder.begin, samples, lengths).macs
    one, read = 12 * frames * 32**2 + 2 * frames**2 * 32, frames * 32 * len(LABELS)
    for rule, threshold, layers, heads in (
        ("entropy", 100.0, 1, 1), ("similarity", -2.0, 1, 1), ("agreement", 1.0, 2, 2), ("entropy", 0.0, 3, 3),
        ("similarity", 2.0, 3, 1), ("none", None, 3, 1),
    ):  # fmt: skip
        model.head.set_rule(rule, threshold)
        assert count_macs(model.recognise, batch, wav_lens).macs == begin + layers * one + heads * read


def test_scores_in_closed_form() -> None:
    """A uniform softmax over c labels has entropy ln c and confidence -ln c; padding does not count."""
    uniform = torch.full((1, 4, 5), -math.log(5), dtype=torch.float64)
    sure = torch.full((1, 4, 5), -1e9, dtype=torch.float64)
    sure[..., 0] = 0
    mixed = torch.cat([torch.cat([uniform[:, :2], sure[:, :2]], dim=1), uniform])
    lengths = torch.tensor([4, 2])
    torch.testing.assert_close(
        early_exit.entropy(mixed, lengths), torch.tensor([math.log(5) / 2, math.log(5)], dtype=torch.float64)
    )
    torch.testing.assert_close(
        early_exit.confidence(mixed, lengths), torch.tensor([-math.log(5) / 2, -math.log(5)], dtype=torch.float64)
    )
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    y = torch.tensor([[[1.0, 1.0], [0.0, 2.0], [9.0, 9.0]]], dtype=torch.float64)
    assert float(early_exit.similarity(x, y, torch.tensor([2]))) == pytest.approx(math.sqrt(0.5) / 2)
    paths = torch.tensor([[0, 3, 3, 0, 3, 2, 2, 5]])
    log_probs = torch.nn.functional.one_hot(paths, 6).double()
    assert early_exit.greedy_labels(log_probs, torch.tensor([7])) == [[3, 3, 2]]
    assert early_exit.disagreement([1, 2, 3, 4], [1, 3, 4]) == 0.25 and early_exit.disagreement([], []) == 0


def test_exits_of_many_thresholds_at_once() -> None:
    scores = np.array([[3.0, 1.0, 2.0, 0.1], [1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    assert early_exit.exits("entropy", scores, 1.5).tolist() == [1, 0, 3]
    assert early_exit.exits("entropy", scores, 1.5, patience=2).tolist() == [3, 1, 3]
    assert early_exit.exits("similarity", scores, 2.5).tolist() == [0, 3, 0]
    assert early_exit.exits("none", scores, 5.0).tolist() == [3, 3, 3]
    assert early_exit.exits("entropy", scores, 5.0, patience=9).tolist() == [3, 3, 3]
    for rule, never in NEVER.items():
        assert early_exit.exits(rule, np.array([[0.0, 1.0]]), never)[0] == 1


def test_heads_are_saved_counted_and_trained(model: CTCModel, wavs: list[torch.Tensor], tmp_path) -> None:
    exits = with_exits(model, [2, 3], "entropy", 0.7)
    exits.head.set_rule("entropy", 0.7, 2)
    exits.save(tmp_path / "model")
    loaded = CTCModel.load(tmp_path / "model")
    assert (loaded.head.rule, loaded.head.threshold, loaded.head.patience) == ("entropy", 0.7, 2)
    assert all(torch.equal(a, b) for a, b in zip(outputs(exits, wavs), outputs(loaded, wavs), strict=True))
    assert len(list(loaded.head.parameters())) == 2 * len(list(model.head.parameters()))
    log_probs, _ = exits(*pad_wavs(wavs), only=[2, 3], train_encoder=False)
    assert log_probs.shape[:2] == (2, len(wavs))
    log_probs.sum().backward()
    assert all(p.grad is not None for p in exits.head.parameters())
    assert all(p.grad is None for p in exits.encoder.parameters())


def test_heads_are_taken_over_by_layer(model: CTCModel) -> None:
    trained = with_exits(model, [1, 2, 3]).head
    for layers, copies in (([2, 3], 1), ([1, 3], 2)):
        config = model.head.config | {"frames_per_state": copies}
        heads = ExitHeads([CTCHead.from_config(config) for _ in layers], layers)
        heads.load_state_dict(heads.init_from(trained))
        for layer, head in zip(layers, heads.heads, strict=True):
            weight = trained.heads[layer - 1].linear.weight
            assert torch.equal(head.linear.weight, torch.cat([weight] * copies))


def test_heads_that_are_not_kept_change_nothing_else(model: CTCModel, wavs: list[torch.Tensor]) -> None:
    """With every head but the first, nobody leaves at layer 1, and the rest is as it was."""
    exits = with_exits(model, [1, 2, 3], "entropy", 100.0)
    before = exits(*pad_wavs(wavs), only=[2, 3])[0]
    exits.head.keep([2])
    assert exits.head.layers == [2, 3] and torch.equal(before, exits(*pad_wavs(wavs), only=[2, 3])[0])
    with torch.no_grad():
        assert {d["exit_layer"] for d in exits.recognise(*pad_wavs(wavs)).details} == {2}


def test_exits_refuse_an_encoder_that_runs_its_layers_itself(model: CTCModel) -> None:
    heads = with_exits(model, [1, 2, 3]).head
    with pytest.raises(UserError, match="cannot be used with LayerDrop"):
        heads.check(LayerDrop(model.encoder, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 2],), "ascending list"), (([0, 3],), "ascending list"), (([],), "ascending list"),
        (([3], "entropie"), "Did you mean 'entropy'"),
        (([3], "entropy", "low"), "expected a number, got 'low'"), (([3], "entropy", 0.1, 0), "expected an integer >= 1"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple, message: str) -> None:
    layers, *rest = arguments
    with pytest.raises(UserError, match=message):
        ExitHeads([CTCHead(8, 4, "none") for _ in layers], layers, *rest)


@pytest.mark.parametrize(("rule", "patience", "allowed"), [
    ("entropy", 2, True), ("entropy", 3, False), ("agreement", 1, True), ("agreement", 2, False), ("none", 9, True),
])  # fmt: skip
def test_a_patience_that_cannot_be_met_is_refused(rule: str, patience: int, allowed: bool) -> None:
    heads = ExitHeads([CTCHead(8, 4, "none") for _ in range(3)], [1, 2, 3], rule, None, patience)
    if allowed:
        heads.check_patience()
    else:
        with pytest.raises(
            UserError, match=f"exit_patience: {patience} heads in a row are needed, but {rule} can score"
        ):
            heads.check_patience()
    ExitHeads([CTCHead(8, 4, "none")], [3], rule).check_patience()  # the identity: one head


def test_the_last_layer_must_have_a_head() -> None:
    encoder = new_whisper_encoder(d_model=16, layers=3, heads=2)
    with pytest.raises(UserError, match="must be the encoder's last layer, 3"):
        ExitHeads([CTCHead(16, 4, "none")], [2]).check(encoder)


def test_a_copy_of_a_model_exits_by_another_rule(
    tiny_ctc: CTCModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    main = runpy.run_path(str(ROOT / "recipes/early_exit/set_rule.py"))["main"]

    def set_rule(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["set_rule.py", *map(str, arguments)])
        return exit_code(main)

    tiny_ctc.head = ExitHeads([CTCHead(32, len(tiny_ctc.labels), "none") for _ in range(2)], [1, 2])
    details = {"exit_rule": "none", "exit_threshold": 0.0, "exit_patience": 1, "mean_exit_layer": 2.0, "kept": 7}
    about = {"recipe": "early_exit", "variant": "full depth"}
    tiny_ctc.save(tmp_path / "trained", about | {"details": details})
    source, fast = tmp_path / "trained", tmp_path / "fast"
    assert set_rule(source, "--rule", "entropy", "--threshold", 9, "--patience", 1, "--out", fast) == 0
    assert "exits by entropy 9" in capsys.readouterr().out
    model = CTCModel.load(fast)
    assert [each["exit_layer"] for each in model.recognise(torch.rand(1, 8000), torch.ones(1)).details] == [1]
    assert all(torch.equal(value, tiny_ctc.state_dict()[name]) for name, value in model.state_dict().items())
    new = {"exit_rule": "entropy", "exit_threshold": 9.0, "exit_patience": 1, "kept": 7}
    known = json.loads((fast / "config.json").read_text())["about"]
    assert known == {"recipe": "early_exit", "variant": "entropy 9", "details": new}
    assert set_rule(source, "--rule", "none", "--layers", 2, "--out", tmp_path / "last") == 0
    last = CTCModel.load(tmp_path / "last").head
    assert last.layers == [2] and torch.equal(last.heads[0].linear.weight, tiny_ctc.head.heads[1].linear.weight)
    assert set_rule(source, "--rule", "none", "--layers", 3, "--out", tmp_path / "x") == 2
    assert "heads on layers [1, 2], but not on [3]" in capsys.readouterr().err
    assert set_rule(source, "--rule", "none", "--out", fast) == 2 and "exists" in capsys.readouterr().err
    tiny_ctc.head = CTCHead(32, len(tiny_ctc.labels), "none")
    tiny_ctc.save(tmp_path / "plain")
    assert set_rule(tmp_path / "plain", "--rule", "none", "--out", tmp_path / "x") == 2
    assert "is no early-exit model" in capsys.readouterr().err


def test_heads_summarise_where_utterances_left() -> None:
    heads = ExitHeads([CTCHead(4, 3, "none") for _ in range(3)], [1, 2, 4])
    records = [{"exit_layer": layer} for layer in (1, 4, 4, 2)]
    assert heads.summary(records) == {"mean_exit_layer": 2.75, "exit_layers": {"1": 1, "2": 1, "4": 2}}
    assert heads.summary([{}]) == {}


def sure(*certain: bool, labels: int = 3, frames: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities that are certain, or uniform, for each utterance."""
    logits = torch.zeros(len(certain), frames, labels)
    logits[torch.tensor(certain), :, 1] = 50.0
    return logits.log_softmax(dim=-1), torch.full((len(certain),), frames)


def test_patience_counts_heads_in_a_row() -> None:
    decisions, rows = _Decisions("entropy", 0.5, 2, 3), torch.arange(3)
    for certain, leaving in (
        ((True, True, False), [False, False, False]),
        ((False, True, True), [False, True, False]),  # the second one has met the threshold twice in a row
    ):
        assert decisions(rows, sure(*certain)).tolist() == leaving
    assert decisions(rows[[0, 2]], sure(True, True)).tolist() == [False, True]  # the first one starts again


def test_agreement_is_with_the_head_before() -> None:
    def saying(label: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.zeros(1, 4, 4)
        logits[:, :, label] = 9.0
        return logits.log_softmax(dim=-1), torch.tensor([4])

    decisions, row = _Decisions("agreement", 0.0, 1, 1), torch.tensor([0])
    said = [decisions(row, saying(label)).tolist() for label in (1, 2, 1, 1)]
    assert said == [[False], [False], [False], [True]]  # not where only the first and the third head agree
