"""Students with fewer layers: which are kept, identity, and that other programs can use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import multilingual_whisper

from efficient_asr.data import pad_wavs
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.pruning import kept_layers, prune
from efficient_asr.utils.errors import UserError


@pytest.mark.parametrize(
    ("wanted", "count", "kept"),
    [
        (-1, 4, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (2, 12, [0, 11]), (3, 12, [0, 5, 11]), (4, 12, [0, 3, 7, 11]), (1, 6, [0]),
        (2, 32, [0, 31]), ([1, 6], 6, [0, 5]), ([3, 2], 6, [1, 2]),
    ],
)  # fmt: skip
def test_kept_layers(wanted: int | list[int], count: int, kept: list[int]) -> None:
    assert kept_layers(wanted, count, "decoder_layers") == kept


@pytest.mark.parametrize("wanted", [0, 7, -2, "two", 2.0, True, [], [0], [7], [1, 1]])
def test_impossible_choices_are_refused(wanted: object) -> None:
    with pytest.raises(UserError, match=r"decoder_layers: expected .* 6"):
        kept_layers(wanted, 6, "decoder_layers")


def test_all_layers_are_the_teacher_bit_for_bit(wavs: list[torch.Tensor]) -> None:
    teacher, student = multilingual_whisper(3), prune(multilingual_whisper(3), -1, 2)
    batch, lengths = pad_wavs(wavs[:2])[0], torch.tensor([len(wav) for wav in wavs[:2]])
    tokens = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        assert torch.equal(teacher(batch, lengths, tokens), student(batch, lengths, tokens))
    assert student.history == {} and student.network.config.to_dict() == teacher.network.config.to_dict()


def test_a_student_has_the_kept_layers_and_transformers_generates_with_it(
    wavs: list[torch.Tensor], tmp_path: Path
) -> None:
    from transformers import WhisperForConditionalGeneration

    teacher, student = multilingual_whisper(3, layers=4), prune(multilingual_whisper(3, layers=4), [1, 4], 2)
    for side in ("encoder", "decoder"):
        layers = [getattr(model.network.model, side).layers for model in (teacher, student)]
        for i, kept in enumerate((0, 3)):
            pairs = zip(layers[0][kept].parameters(), layers[1][i].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert student.history["pruning"] == {"kept_encoder_layers": [1, 4], "kept_decoder_layers": [1, 4]}
    student.save(tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (2, 2)
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    ours = Whisper.from_source(str(tmp_path / "student"))
    wav = wavs[0][None]
    features = ours.features(wav, torch.tensor([wav.shape[1]]))
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "language": "en", "task": "transcribe"}
    cached, fresh = (theirs.generate(features, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, fresh) and cached.numel() > 0  # the layers know their new places in the cache
    lengths, tokens = torch.tensor([wav.shape[1]]), torch.tensor([[ours.labels.start, 5, 6]])
    with torch.no_grad():
        assert torch.allclose(
            ours(wav, lengths, tokens), theirs(features, decoder_input_ids=tokens).logits, rtol=0, atol=1e-5
        )


def test_heads_that_align_words_move_with_their_layers() -> None:
    model = multilingual_whisper(0, layers=4)
    model.network.generation_config.alignment_heads = [[0, 1], [2, 0], [3, 1]]
    prune(model, -1, 2)
    assert model.network.generation_config.alignment_heads == [[0, 1], [1, 1]]
    prune(model, -1, [2])
    assert model.network.generation_config.alignment_heads == [[0, 1]]
    model = multilingual_whisper(0, layers=4)
    model.network.generation_config.alignment_heads = [[2, 0]]
    prune(model, -1, 2)
    assert not hasattr(model.network.generation_config, "alignment_heads")


def test_a_whisper_with_other_layers_is_refused() -> None:
    model = multilingual_whisper(0)
    model.__class__ = type("Other", (Whisper,), {"technique": "experts"})
    with pytest.raises(UserError, match="experts cannot lose layers"):
        prune(model, -1, 1)


def test_layers_that_are_kept_use_consecutive_places_in_the_cache() -> None:
    whisper = prune(multilingual_whisper(seed=1), decoder_layers=[2])
    attention = [(layer.self_attn, layer.encoder_attn) for layer in whisper.network.model.decoder.layers]
    assert [[each.layer_idx for each in pair] for pair in attention] == [[0, 0]]
