from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file

from efficient_asr.data import pad_wavs
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.models.ctc import CTCHead, CTCModel, greedy_texts
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.models.parts import Part
from efficient_asr.techniques.downsampling import Downsampler
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError


@pytest.mark.parametrize("block", ["feedforward", "bilstm", "none"])
@pytest.mark.parametrize("frames_per_state", [1, 2])
def test_log_probs_do_not_depend_on_batch_mates(
    block: str, frames_per_state: int, wavs: list[torch.Tensor], ssl_sources: dict[str, str]
) -> None:
    torch.manual_seed(0)
    labels = CharacterLabels.from_texts(TEXTS)
    head = CTCHead(32, len(labels), block, 16, 2, frames_per_state=frames_per_state)
    model = CTCModel(Downsampler("average", 2), load_encoder(ssl_sources["wavlm-large"]), head, labels).eval()
    with torch.no_grad():
        together, lengths = model(*pad_wavs(wavs))
        for i, wav in enumerate(wavs):
            alone, length = model(wav[None], torch.ones(1))
            assert length == lengths[i] == alone.shape[1] and length % frames_per_state == 0
            torch.testing.assert_close(together[i, : int(length)], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.exp().sum(-1), torch.ones(alone.shape[:2]))
    assert model.frame_lengths(torch.tensor([len(wav) for wav in wavs])).tolist() == lengths.tolist()


@pytest.mark.parametrize("lengths", [[100, 53, 59], [99, 56, 62], [7, 1, 0]])
def test_a_recurrent_head_reads_whole_utterances(lengths: list[int]) -> None:
    """Relative lengths times the frames of the batch are not always whole numbers again."""
    torch.manual_seed(0)
    head, states = CTCHead(4, 3, "bilstm", 8).eval(), torch.randn(3, 100, 4)
    with torch.no_grad():
        together, found = head(states, torch.tensor(lengths))
        assert together.shape[1] == 100 and found.tolist() == lengths
        for i, length in enumerate(lengths):
            alone, _ = head(states[i : i + 1, : max(1, length)], torch.tensor([length]))
            torch.testing.assert_close(together[i, :length], alone[0, :length], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["wavlm-base", "wav2vec2-large", "distilhubert"])
def test_saved_folder_gives_the_same_log_probs(
    kind: str, tmp_path: Path, wavs: list[torch.Tensor], ssl_sources: dict[str, str]
) -> None:
    labels = CharacterLabels.from_texts(TEXTS)
    downsampler = Downsampler("convolutional", 2)
    model = CTCModel(downsampler, load_encoder(ssl_sources[kind]), CTCHead(32, len(labels), "bilstm", 8), labels).eval()
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = CTCModel.load(tmp_path / "model")
    assert loaded.labels.characters == labels.characters
    with torch.no_grad():
        assert torch.equal(model(*pad_wavs(wavs))[0], loaded(*pad_wavs(wavs))[0])


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = CharacterLabels.from_texts(TEXTS)
    first, second = (
        CTCModel(Downsampler("none", 1), new_whisper_encoder(16, 1, 2), CTCHead(16, len(labels)), labels)
        for _ in range(2)
    )
    first.save(tmp_path / "a" / "model")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        second.save(tmp_path / "a" / "model")
    assert torch.equal(CTCModel.load(tmp_path / "a" / "model").head.linear.weight, first.head.linear.weight)
    second.save(tmp_path / "a" / "model")
    assert torch.equal(CTCModel.load(tmp_path / "a" / "model").head.linear.weight, second.head.linear.weight)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


@pytest.mark.parametrize(
    "kind",
    [
        "os.system",
        "models.ctc.Path",
        "models.ctc.torch",
        "techniques.nothing.X",
        "models.ctc.CTCModel.load",
        "../x",
        None,
        3,
    ],
)
def test_a_model_folder_cannot_name_foreign_code(kind: object, tmp_path: Path, tiny_ctc: CTCModel) -> None:
    tiny_ctc.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["head"] = {"type": kind, "config": {"command": f"touch {tmp_path}/executed"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="head"):
        CTCModel.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_damaged_folders_are_named(tmp_path: Path, tiny_ctc: CTCModel) -> None:
    tiny_ctc.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    state.pop("head.linear.bias")
    save_file(state, weights)
    with pytest.raises(UserError, match=r"1 missing, 0 unexpected: head\.linear\.bias"):
        CTCModel.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        CTCModel.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        CTCModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="does not describe a CTC model"):
        CTCModel.load(tmp_path)


def test_start_from_takes_what_fits(tmp_path: Path, tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    from efficient_asr.models.encoders.whisper import new_whisper_encoder

    tiny_ctc.save(tmp_path)
    torch.manual_seed(9)
    head = CTCHead(32, len(tiny_ctc.labels), "none")
    fresh = CTCModel(Downsampler("convolutional", 2), new_whisper_encoder(32, 2, 2), head, tiny_ctc.labels)
    left = fresh.start_from(tmp_path)
    assert left and all(name.startswith("frontend.") for name in left)
    for name, value in tiny_ctc.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    other = CTCModel(
        torch.nn.Identity(), new_whisper_encoder(48, 2, 2), CTCHead(48, len(tiny_ctc.labels), "none"), tiny_ctc.labels
    )
    with pytest.raises(UserError, match="does not match"):
        other.start_from(tmp_path)
    labels = CharacterLabels(["x"])
    with pytest.raises(UserError, match="different alphabet"):
        CTCModel(torch.nn.Identity(), new_whisper_encoder(32, 2, 2), CTCHead(32, 2, "none"), labels).start_from(
            tmp_path
        )


def test_a_head_that_emits_more_frames_starts_with_the_same_texts(
    tmp_path: Path, tiny_ctc: CTCModel, wavs: list[torch.Tensor]
) -> None:
    from efficient_asr.models.encoders.whisper import new_whisper_encoder

    torch.nn.init.normal_(tiny_ctc.head.linear.weight)
    tiny_ctc.save(tmp_path)
    head = CTCHead(32, len(tiny_ctc.labels), "none", frames_per_state=2)
    fresh = CTCModel(torch.nn.Identity(), new_whisper_encoder(32, 2, 2), head, tiny_ctc.labels).eval()
    assert fresh.start_from(tmp_path) == []
    batch = pad_wavs(wavs)
    with torch.no_grad():
        one, two = tiny_ctc(*batch), fresh(*batch)
    assert two[1].tolist() == [2 * n for n in one[1].tolist()]
    texts = greedy_texts(*one, tiny_ctc.labels)
    assert texts == greedy_texts(*two, tiny_ctc.labels) and any(texts)


def test_an_encoder_that_was_trained_behind_a_front_end_keeps_it(tmp_path: Path, tiny_ctc: CTCModel) -> None:
    trained = CTCModel(Downsampler("average", 2), tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
    trained.save(tmp_path)
    same = CTCModel(Downsampler("average", 2), tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
    assert same.start_from(tmp_path) == []
    for frontend in (torch.nn.Identity(), Downsampler("average", 3)):
        other = CTCModel(frontend, tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
        with pytest.raises(UserError, match="was trained behind 'average x2'"):
            other.start_from(tmp_path)


def test_a_front_end_filters_in_full_precision(tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    model = CTCModel(Downsampler("signal", 2), tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
    expected, _ = model.apply_frontend(*pad_wavs(wavs))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.apply_frontend(*pad_wavs(wavs))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_audio_beyond_the_window_is_named_before_the_first_utterance(tiny_ctc: CTCModel) -> None:
    rows = [{"id": "a", "duration": 30.0}, {"id": "b", "duration": 30.2}]
    CTCTranscriber(tiny_ctc).check_rows(rows[:1], "test")
    with pytest.raises(UserError, match=r"utterance 'b' of 'test' has 30.20 s, more than the 30 s"):
        CTCTranscriber(tiny_ctc).check_rows(rows, "test")
    half = CTCModel(Downsampler("average", 2), tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
    CTCTranscriber(half).check_rows(rows, "test")


def test_encoder_of_a_trained_model_is_a_source(tmp_path: Path, tiny_ctc: CTCModel) -> None:
    tiny_ctc.save(tmp_path)
    encoder = load_encoder(str(tmp_path), output_norm=True)
    assert encoder.output_norm
    for name, value in tiny_ctc.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)


def test_padding_stays_masked_in_an_encoder_taken_from_a_model(
    tmp_path: Path, ssl_sources: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    labels = CharacterLabels.from_texts(TEXTS)
    encoder = load_encoder(ssl_sources["wav2vec2-base"])
    CTCModel(torch.nn.Identity(), encoder, CTCHead(32, len(labels), "none"), labels).save(tmp_path)
    encoder = load_encoder(str(tmp_path)).eval()
    batch, _ = pad_wavs(wavs)
    with torch.no_grad():
        together = encoder(batch, torch.tensor([len(wav) for wav in wavs]))
        alone = encoder(wavs[2][None], torch.tensor([len(wavs[2])]))
    torch.testing.assert_close(together.states[2, : alone.states.shape[1]], alone.states[0], rtol=1e-4, atol=2e-5)


def test_half_precision_weights_are_read_as_float32(tmp_path: Path, ssl_sources: dict[str, str]) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(ssl_sources["hubert-base"]).half().save_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in load_encoder(str(tmp_path)).parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("labels"), "alphabet does not match"),
        (lambda c: c["labels"].append("!"), "alphabet does not match"),
        (lambda c: c["encoder"]["config"]["network"].update(model_type="bert"), "damaged"),
        (lambda c: c["encoder"]["config"]["network"].update(d_model=64), "do not match config.json"),
        (lambda c: c["encoder"].pop("config"), "damaged"),
        (lambda c: c.pop("head"), "no technique declares"),
    ],
)
def test_a_changed_configuration_is_refused_with_a_sentence(
    change: object, message: str, tmp_path: Path, tiny_ctc: CTCModel
) -> None:
    tiny_ctc.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        CTCModel.load(tmp_path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "auto_map"])
def test_a_configuration_cannot_make_transformers_fetch_code(key: str, tmp_path: Path, tiny_ctc: CTCModel) -> None:
    tiny_ctc.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"]["config"]["network"][key] = "somebody/kernels"
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = CTCModel.load(tmp_path)
    assert "somebody" not in str(loaded.encoder.model.config.to_dict())


def test_greedy_collapses_repeats_then_blanks() -> None:
    labels = CharacterLabels([" ", "a", "b"])
    path = [2, 2, 0, 2, 3, 3, 1, 1, 0, 1, 2]  # aa_abb  _ a
    log_probs = torch.nn.functional.one_hot(torch.tensor([path]), 4).float().log_softmax(-1)
    assert greedy_texts(log_probs, torch.tensor([11]), labels) == ["aab a"]
    assert greedy_texts(log_probs, torch.tensor([4]), labels) == ["aa"]
    assert greedy_texts(log_probs, torch.tensor([0]), labels) == [""]


def test_gradients_reach_a_learned_front_end_through_everything(wavs: list[torch.Tensor]) -> None:
    from efficient_asr.models.encoders.whisper import new_whisper_encoder

    labels = CharacterLabels.from_texts(TEXTS)
    encoder = new_whisper_encoder(32, 1, 2, spec_augment=True)
    downsampler = Downsampler("convolutional", 2, convolution_init="lowpass")
    model = CTCModel(downsampler, encoder, CTCHead(32, len(labels), "bilstm", 8), labels).train()
    model(*pad_wavs(wavs))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in downsampler.parameters())
    assert downsampler.filter.downsampler.conv.weight.grad.abs().sum() > 0


def test_head_refuses_nonsense() -> None:
    with pytest.raises(UserError, match="use feedforward, bilstm or none"):
        CTCHead(4, 3, "lstm")
    with pytest.raises(UserError, match="less than 1"):
        CTCHead(4, 3, frames_per_state=0)


def test_parts_sum_up_what_they_did(tiny_ctc: CTCModel) -> None:
    class Counted(Part):
        technique = "counted"

        def forward(self, wavs_and_lengths: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return wavs_and_lengths

        def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
            return {"utterances_seen": len(list(records))}

    assert CTCTranscriber(tiny_ctc).summary([{}, {}]) == {}
    model = CTCModel(Counted(), tiny_ctc.encoder, tiny_ctc.head, tiny_ctc.labels)
    assert CTCTranscriber(model).summary([{}, {}]) == {"utterances_seen": 2} and model.technique == "counted"
    with pytest.raises(UserError, match="no technique declares it"):
        model.settings  # noqa: B018
