"""Selection of int8 layers: bisection against all choices, divergences in float64, the float model unchanged, the command."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from efficient_asr import load_transcriber
from efficient_asr.models.int8 import RowWise, WeightOnly, put_back, quantisable, quantise, replace
from efficient_asr.models.sources import resolve_source
from efficient_asr.techniques.int8_search.search import Sensitivity, groups_of, observe, search
from efficient_asr.utils.errors import UserError

MINI = "efficient_asr:mini_whisper_large"
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="needs FBGEMM, which this CPU does not have"
)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0, 3.0, 6.9, 7.0, 100.0])
def test_as_many_groups_as_the_budget_allows(budget: float) -> None:
    costs = {"a": 4.0, "b": 1.0, "c": 2.0}
    alone, chosen, together = search(lambda groups: sum(costs[name] for name in groups), costs, budget)
    wanted = max(
        (names for names in ([], ["b"], ["b", "c"], ["b", "c", "a"]) if sum(costs[name] for name in names) <= budget),
        key=len,
    )
    assert alone == costs and chosen == wanted
    assert together[len(wanted)] == sum(costs[name] for name in wanted) and together[3] == sum(costs.values())
    assert search(lambda groups: 0.0, [], budget) == ({}, [], {0: 0.0})


def test_groups_are_blocks() -> None:
    names = [f"decoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "fc1", "fc2")]
    assert groups_of([*names, "proj_out"]) == {
        "decoder.layers.0.self_attn": names[:2], "decoder.layers.0.mlp": names[2:], "proj_out": ["proj_out"],
    }  # fmt: skip


def test_divergence_is_that_of_the_distributions_and_the_model_is_as_before(wavs: list[torch.Tensor]) -> None:
    transcriber = load_transcriber(MINI, language="en")
    whisper = transcriber.model
    before = {name: value.clone() for name, value in whisper.network.state_dict().items()}
    texts = [transcriber.transcribe(wav[None])[0].text for wav in wavs]
    observations = observe(whisper, wavs, texts, "en")
    divergence = Sensitivity(whisper, observations, "en")
    assert divergence([]) == 0.0
    for groups in (["proj_out"], ["encoder.layers.0.mlp"], list(divergence.groups)):
        found = divergence(groups)
        other = load_transcriber(MINI, language="en").model
        replace(other.network, [name for group in groups for name in divergence.groups[group]])
        total = count = 0.0
        for wav, target, log_probs in observations:
            with torch.no_grad():
                own = other.predict(other.encode(wav, torch.tensor([wav.shape[1]])), target).double().log_softmax(-1)
            p, own = (
                log_probs.double(),
                own[:, other.labels.prompt_length - 1 :],
            )  # the text and its end, without the prompt
            total, count = total + float((p.exp() * (p - own)).sum()), count + own.shape[1]
        assert found == pytest.approx(total / count, rel=1e-3, abs=1e-7) and found > 0
    after = whisper.network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, (RowWise, WeightOnly)) for module in whisper.network.modules())
    assert [transcriber.transcribe(wav[None])[0].text for wav in wavs] == texts


def test_named_modes_are_selections() -> None:
    for mode, start in (("decoder-int8", ("decoder", "proj_out")), ("encoder-int8", "encoder"), ("int8", "")):
        network = load_transcriber(MINI).model.network
        names = [name for name in quantisable(network) if name.startswith(start)]
        assert names and quantise(network, mode) == mode
        found = {name for name, module in network.named_modules() if isinstance(module, (RowWise, WeightOnly))}
        layers = {name.removeprefix("model.") for name in found if not name.endswith("qkv_proj")}
        assert layers == set(names)
    network = load_transcriber(MINI).model.network
    put_back(network, replace(network, quantisable(network)))
    assert not any(isinstance(module, (RowWise, WeightOnly)) for module in network.modules())


@pytest.fixture
def run(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs scripts/search_int8.py and returns its exit code."""

    def run(*more: object) -> int:
        common = [resolve_source(MINI), "--calibration", corpus / "test.jsonl", "--language", "en"]
        monkeypatch.setattr(sys, "argv", ["search_int8.py", *map(str, [*common, *more])])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "scripts" / "search_int8.py"), run_name="__main__")
        return done.value.code

    return run


def test_an_interrupted_search_resumes(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measured, stop_at, measure = [], [6], Sensitivity.__call__

    def counted(self: Sensitivity, groups: Iterable[str]) -> float:
        groups = list(groups)
        if len(measured) == stop_at[0]:
            raise KeyboardInterrupt
        measured.append(groups)
        return measure(self, groups)

    monkeypatch.setattr(Sensitivity, "__call__", counted)
    options = ("--budget_nats", "1e-4")
    assert run("--out", tmp_path / "cut.json", *options) == 130 and not (tmp_path / "cut.json").exists()
    stop_at[0] = -1
    assert run("--out", tmp_path / "cut.json", *options) == 0
    resumed = list(measured)
    measured.clear()
    assert run("--out", tmp_path / "whole.json", *options) == 0
    assert sorted(map(str, resumed)) == sorted(map(str, measured)) and len(measured) > 6
    cut, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cut", "whole"))
    assert cut | {"provenance": None} == whole | {"provenance": None}
    assert not list(tmp_path.glob("*.part*"))
    capsys.readouterr()


def test_the_command_writes_a_selection_that_models_take(
    run: Callable[..., int], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, wavs: list[torch.Tensor]
) -> None:
    out = tmp_path / "selection.json"
    assert run("--out", out, "--budget_nats", "1e-4", "--manifest", corpus / "test.jsonl") == 0
    found = json.loads(out.read_text())
    blocks = {block["block"]: block for block in found["blocks"]}
    chosen = [name for name, block in blocks.items() if block["chosen"]]
    assert 0 < len(chosen) < len(blocks) and found["kl_nats"] <= 1e-4 < found["kl_nats_of_all"]
    assert max(blocks[name]["kl_nats"] for name in chosen) <= min(
        block["kl_nats"] for block in blocks.values() if not block["chosen"]
    )
    assert [entry["mode"] for entry in found["check"]][:3] == ["float32", "decoder-int8", "int8"]
    int8 = load_transcriber(MINI, language="en", quantise=str(out))
    assert int8.label == found["check"][3]["mode"] and f"{len(found['modules'])} of" in int8.label
    assert int8.transcribe(wavs[0][None])[0].text
    assert run("--out", tmp_path / "none.json", "--budget_nats", "0") == 0
    assert json.loads((tmp_path / "none.json").read_text())["modules"] == []
    plain = load_transcriber(MINI, language="en")
    none = load_transcriber(MINI, language="en", quantise=str(tmp_path / "none.json"))
    for wav in wavs:  # the identity
        assert none.transcribe(wav[None])[0].details == plain.transcribe(wav[None])[0].details
    assert run("--out", tmp_path / "selection.txt") == 2 and run("--out", out, "--budget_nats", "-1") == 2
    capsys.readouterr()


def test_selections_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    selection = tmp_path / "selection.json"
    for text, message in (
        ("{}", "is not a selection"), ('{"modules": "proj_out", "layers": 3}', "not a list of different names"),
        ('{"modules": ["proj_out", "proj_out"], "layers": 3}', "not a list of different names"),
        ("nonsense", "is not a selection"), ('{"modules": 3}', "is not a selection"),
        ('{"modules": ["proj_out"], "layers": 999}', "is of another model: it chooses from 999 layers"),
    ):  # fmt: skip
        selection.write_text(text)
        with pytest.raises(UserError, match=message):
            load_transcriber(MINI, quantise=str(selection))
    with pytest.raises(UserError, match="is not a selection"):
        load_transcriber(MINI, quantise=str(tmp_path / "missing.json"))
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="quantise: '8' is invalid"):
        load_transcriber(MINI, quantise=8)
    with pytest.raises(UserError, match="selects layers of one model; with an assistant"):
        load_transcriber(MINI, quantise=str(selection), assistant="efficient_asr:mini_whisper_small")
    pytest.importorskip("onnxruntime")
    selection.write_text('{"modules": []}')
    with pytest.raises(UserError, match="backend torch only"):
        load_transcriber(MINI, quantise=str(selection), backend="onnx")
