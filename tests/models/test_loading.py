"""Checkpoints that do not fit, were saved quantised, or are adapters: said, or loaded right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import chirp, multilingual_whisper
from safetensors.torch import load_file, save_file

import efficient_asr
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.sources import fingerprint
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError


def rename(source: str, folder: Path, change: object) -> str:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({change(key): value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def configure(source: str, folder: Path, **changes: object) -> str:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("kind", ["wav2vec2-base", "wavlm-large"])
def test_a_known_prefix_is_left_out_and_said(
    prefix: str, kind: str, ssl_sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = rename(ssl_sources[kind], tmp_path / "m", lambda key: prefix + key)
    found, expected = load_encoder(folder).state_dict(), load_encoder(ssl_sources[kind]).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert f"begin with '{prefix}'" in capsys.readouterr().err


def test_weights_of_other_names_are_refused(ssl_sources: dict[str, str], tmp_path: Path) -> None:
    folder = rename(ssl_sources["hubert-base"], tmp_path / "m", lambda key: key.replace("layers.1.", "blocks.1."))
    with pytest.raises(UserError, match=r"lacks .* of its weights"):
        load_encoder(folder)


def test_fewer_layers_than_the_weights_have_are_refused(
    ssl_sources: dict[str, str], tiny_whispers: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="do not belong to any of the model's layers"):
        load_encoder(configure(ssl_sources["hubert-base"], tmp_path / "a", num_hidden_layers=2))
    with pytest.raises(UserError, match="do not belong to any of the model's layers"):
        Whisper.from_source(configure(tiny_whispers["large"], tmp_path / "b", encoder_layers=1))


def test_weights_of_another_shape_are_refused(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Whisper.from_source(configure(tiny_whispers["large"], tmp_path / "a", encoder_ffn_dim=64))


@pytest.mark.parametrize("about", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq"}])
def test_quantised_models_are_named(about: dict, tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    folder = configure(tiny_whispers["small"], tmp_path / "m", quantization_config=about)
    for load in (load_encoder, Whisper.from_source, efficient_asr.load_transcriber):
        with pytest.raises(UserError, match=f"saved quantised, by {about['quant_method']}.*dequantize"):
            load(folder)


@pytest.mark.parametrize("lost", [["lang_to_id"], ["task_to_id"], ["lang_to_id", "task_to_id", "is_multilingual"]])
def test_a_generation_config_is_completed_from_the_tokenizer(lost: list[str], tmp_path: Path) -> None:
    whole = multilingual_whisper(seed=1)
    whole.save(tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in lost}))
    found = Whisper.from_source(str(tmp_path / "m"))
    assert found.labels.languages == whole.labels.languages and found.labels.prompt(
        "de", _options()
    ) == whole.labels.prompt("de", _options())
    if "lang_to_id" in lost:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            tokenizer = tmp_path / "m" / name
            tokenizer.write_text(re.sub(r"<\|(en|de|fr|nl)\|>", r"<|-\1|>", tokenizer.read_text()))
        if "is_multilingual" not in lost:
            with pytest.raises(UserError, match="has no lang_to_id"):
                Whisper.from_source(str(tmp_path / "m"))


def _options() -> object:
    from efficient_asr.models.whisper.decoding import DecodingOptions

    return DecodingOptions()


def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = multilingual_whisper(seed=1)
    base.save(tmp_path / "base")
    base.network.config._name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(base.network, config)
    adapted.base_model.model.name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    found = efficient_asr.load_transcriber(tmp_path / "adapter", language="German")
    for key, value in found.model.network.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    wav = torch.from_numpy(chirp(1.0, 100, 500))
    assert isinstance(found.transcribe(wav, torch.ones(1))[0].text, str) and found.language == "de"

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = dict(list(weights.items())[1:])
    save_file(lost, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights"):
        efficient_asr.load_transcriber(tmp_path / "adapter")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(UserError, match=r"which cannot be loaded.*merge_and_unload"):
        efficient_asr.load_transcriber(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a peft adapter"):
        load_encoder(str(tmp_path / "adapter"))


def test_the_fingerprint_of_an_adapter_has_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("1")
    alone = fingerprint(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    first = fingerprint(adapter)
    assert first not in (alone, fingerprint(base)) and first == fingerprint(adapter)
    (base / "config.json").write_text("2")
    assert fingerprint(adapter) != first
    for damaged in ("[1]", "{", '{"base_model_name_or_path": 3}'):
        (adapter / "adapter_config.json").write_text(damaged)
        fingerprint(adapter)


def test_damaged_folders_are_named(ssl_sources: dict[str, str], tmp_path: Path) -> None:
    for number, (lost, name, content) in enumerate([
        ("model.safetensors", "pytorch_model.bin", b""), ("model.safetensors", "model.safetensors.index.json", b"{}"),
    ]):  # fmt: skip
        folder = Path(shutil.copytree(ssl_sources["hubert-base"], tmp_path / str(number)))
        (folder / lost).unlink()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError):
            load_encoder(str(folder))
    with pytest.raises(UserError):
        load_encoder(configure(ssl_sources["hubert-base"], tmp_path / "x", hidden_size="x"))
