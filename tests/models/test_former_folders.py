"""Model folders that the first version wrote (tests/fixtures/README.md) open and transcribe as they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, environment_folder, make_wavs
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.data import load_audio
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.parts import CORE_PARTS
from efficient_asr.utils.technique import techniques

FOLDERS = ROOT / "tests" / "fixtures" / "first_version"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", EXPECTED)
def test_a_folder_of_the_first_version_transcribes_as_it_did(name: str) -> None:
    if name == "lora_apart":
        pytest.importorskip("peft")
    transcriber, wavs = load_transcriber(FOLDERS / name), make_wavs()
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    found = transcriber.transcribe(batch, torch.tensor([len(wav) for wav in wavs]) / batch.shape[1])
    expected = EXPECTED[name]
    details = [
        {key: value for key, value in one.details.items() if key not in ("min_logprob", "unfinished")} for one in found
    ]  # came later
    texts = [one.text for one in found]
    assert [{"text": text, **rounded(of)} for text, of in zip(texts, details, strict=True)] == expected["transcripts"]
    assert (transcriber.technique, transcriber.label) == (expected["technique"], expected["label"])
    assert transcriber.parameters_count() == expected["parameters"]


def test_every_kind_of_part_is_among_them() -> None:
    stored = "".join(path.read_text(encoding="utf-8") for path in FOLDERS.rglob("config.json"))
    former = [name for technique in techniques() for name in technique.former_names]
    assert former
    for name in former:
        assert f'"{name}"' in stored, f"no fixture has a {name}"


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith(("ctc", "down", "layer", "early"))])
def test_saved_again_it_has_the_same_weights_and_stable_names(name: str, tmp_path: Path) -> None:
    CTCModel.load(FOLDERS / name).save(tmp_path)
    before, after = load_file(FOLDERS / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    known = {"identity", *CORE_PARTS, *(part for technique in techniques() for part in technique.parts)}
    assert {config[part]["type"] for part in ("frontend", "encoder", "head")} <= known


@pytest.mark.real
def test_the_shared_model_of_the_first_version(real_data: Path) -> None:
    folder = real_data.parent / "models" / "whisper_base_ctc"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    assert environment_folder("EFFICIENT_ASR_DATA") == real_data
    manifest = real_data / "arctic_en" / "manifest.jsonl"
    rows = [row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if row["split"] == "test"]
    transcriber = load_transcriber(folder)
    wav = load_audio(manifest.parent / rows[0]["audio"])
    text = transcriber.transcribe(wav[None], torch.ones(1))[0].text
    assert len({*text.split()} & {*rows[0]["text"].lower().split()}) >= 2, (text, rows[0]["text"])
