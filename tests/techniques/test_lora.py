"""LoRA by peft: identity, files, merging."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import multilingual_whisper

from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.utils.errors import UserError

LENGTHS = torch.tensor([32000, 20000])


@pytest.fixture
def plain() -> Whisper:
    return multilingual_whisper(seed=1)


def logits(model: Whisper) -> torch.Tensor:
    torch.manual_seed(0)
    wavs, tokens = torch.randn(2, 32000) * 0.1, torch.randint(0, 250, (2, 8))
    with torch.no_grad():
        return model(wavs, LENGTHS, tokens)


def trained(plain: Whisper, **options) -> LoraWhisper:
    model = LoraWhisper.adapt(copy.deepcopy(plain), rank=4, alpha=8, **options)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_untrained_lora_changes_nothing_and_alone_learns(plain: Whisper) -> None:
    model = LoraWhisper.adapt(copy.deepcopy(plain), rank=4)
    assert torch.equal(logits(model), logits(plain))
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned and all("lora_" in name and ("fc1" in name or "fc2" in name) for name in learned)
    # both matrices of both linear layers of two encoder and two decoder layers: rank * (in + out)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 2 * 4 * (16 + 64)


def test_one_layer_is_its_closed_form(plain: Whisper) -> None:
    model = trained(plain)
    layer = model.network.model.encoder.layers[0].fc1
    original = plain.network.model.encoder.layers[0].fc1
    x = torch.randn(3, 16)
    change = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), original(x) + x @ change.T)


def test_merged_folder_is_a_plain_whisper(plain: Whisper, tmp_path: Path) -> None:
    model = trained(plain, merge=True)
    model.save(tmp_path / "model", {"technique": "lora", "variant": "LoRA", "details": {}})
    loaded = Whisper.from_source(str(tmp_path / "model"))
    assert type(loaded) is Whisper and loaded.technique == "lora"
    assert set(loaded.network.state_dict()) == set(plain.network.state_dict())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-2)


def test_kept_apart_the_original_stays_as_it_was(plain: Whisper, tmp_path: Path) -> None:
    model = trained(plain, merge=False)
    model.save(tmp_path / "model", {"technique": "lora", "variant": "LoRA", "details": {}})
    assert (tmp_path / "model" / "lora" / "adapter_model.safetensors").is_file()
    loaded = Whisper.from_source(str(tmp_path / "model"))
    assert isinstance(loaded, LoraWhisper)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    loaded.save(tmp_path / "again")
    torch.testing.assert_close(logits(Whisper.from_source(str(tmp_path / "again"))), logits(model), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("adapter")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(Whisper.from_source(str(tmp_path / "model"))), logits(plain))


def test_both_forms_transcribe_alike(plain: Whisper, tmp_path: Path) -> None:
    texts, wavs = [], torch.randn(2, 32000) * 0.1
    for merge in (True, False):
        trained(plain, merge=merge).save(tmp_path / str(merge))
        transcriber = WhisperTranscriber.from_source(str(tmp_path / str(merge)), "de")
        transcriber.model.network.double()  # a random network is of two minds about much; rounding must not decide
        texts.append([t.text for t in transcriber.transcribe(wavs, LENGTHS / 32000)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("options", [{"targets": ["fc3"]}, {"rank": 0}])
def test_settings_that_make_no_sense(plain: Whisper, options: dict) -> None:
    with pytest.raises(UserError, match="lora"):
        LoraWhisper.adapt(plain, **options)


def test_missing_or_damaged_matrices(plain: Whisper, tmp_path: Path) -> None:
    trained(plain, merge=False).save(tmp_path / "model")
    path = tmp_path / "model" / "lora" / "adapter_model.safetensors"
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="lora"):
        Whisper.from_source(str(tmp_path / "model"))
    path.unlink()
    with pytest.raises(UserError, match="lora"):
        Whisper.from_source(str(tmp_path / "model"))


def test_a_folder_cannot_name_any_class(plain: Whisper, tmp_path: Path) -> None:
    plain.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    for adapter in ("os.system", "techniques.decider.Decider", "techniques.nothing.Here"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": adapter}))
        with pytest.raises(UserError):
            Whisper.from_source(str(tmp_path / "model"))


def test_dropout_is_on_the_low_rank_path_and_only_in_training(plain: Whisper) -> None:
    for dropout in (0.0, 0.5):
        model = trained(plain, dropout=dropout)
        rates = {
            module.p for name, module in model.named_modules() if ".lora_dropout." in name and hasattr(module, "p")
        }
        assert rates == ({dropout} if dropout else set())
        assert torch.equal(logits(model.eval()), logits(model.eval()))
        assert torch.equal(logits(model.train()), logits(model.eval())) != bool(dropout)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_a_pickle_in_place_of_matrices_is_refused_and_not_executed(plain: Whisper, tmp_path: Path) -> None:
    """As a model of this project, and as an adapter of peft beside its base."""
    plain.save(tmp_path / "base")
    trained(plain, merge=False).save(tmp_path / "model")
    adapter = tmp_path / "model" / "lora"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Malice(tmp_path / "executed")}, adapter / "adapter_model.bin")
    for source in (tmp_path / "model", adapter):
        with pytest.raises(UserError, match=r"cannot be loaded|is not a file of weights"):
            Whisper.from_source(str(source))
    assert not (tmp_path / "executed").exists()
