"""Language experts on a real Whisper and real speech."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efficient_asr.data import iterate_batches, read_manifest
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.clsr.experts import ExpertSettings
from efficient_asr.techniques.clsr.model import add_experts

pytestmark = pytest.mark.real


def test_experts_in_a_real_whisper(real_models: Path, real_data: Path, tmp_path: Path) -> None:
    """Untrained they change nothing; changed, they touch their language only, whoever shares the batch."""
    source = str(real_models / "whisper-tiny")
    rows = read_manifest(real_data / "kerstin_de" / "manifest.jsonl")[:2]
    _, wavs, wav_lens = next(iterate_batches(rows, 2))
    plain = WhisperTranscriber.from_source(source, "de")
    expected = [t.text for t in plain.transcribe(wavs, wav_lens)]
    assert len(expected[0].split()) > 3
    model = add_experts(Whisper.from_source(source), ["de"], ExpertSettings())
    experts = WhisperTranscriber(model, "manifest")
    found = experts.transcribe(wavs, wav_lens, languages=["de", "de"])
    assert [t.text for t in found] == expected
    usage = found[0].details["gate_usage"]
    assert len(usage) == 8 and all(opened == seen for opened, seen in usage.values())
    torch.manual_seed(0)
    for part in model.network.expert("de").values():
        torch.nn.init.normal_(part.gate_out.weight, std=1.0)
        for linear in (part.fc1, part.fc2):
            linear.weight.data += 0.02 * torch.randn_like(linear.weight)
    changed = experts.transcribe(wavs[:1], wav_lens[:1], languages=["de"])[0]
    assert changed.text != expected[0]
    assert (
        0
        < sum(opened for opened, _ in changed.details["gate_usage"].values())
        < sum(seen for _, seen in changed.details["gate_usage"].values())
    )
    mixed = experts.transcribe(wavs[[0, 1]], wav_lens[[0, 1]], languages=["de", "nl"])
    (dutch,) = WhisperTranscriber(plain.model, "nl").transcribe(wavs[1:], wav_lens[1:])
    assert [t.text for t in mixed] == [changed.text, dutch.text]
    model.save(tmp_path / "model")
    (again,) = WhisperTranscriber.from_source(str(tmp_path / "model"), "de").transcribe(wavs[:1], wav_lens[:1])
    assert again.text == changed.text
