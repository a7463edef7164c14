"""Frozen lower layers: the encoder continues exactly from their states, which may be on the disk; they do not learn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_tiny_yaml
from safetensors.torch import load_file

from efficient_asr.data import read_manifest
from efficient_asr.data.augmentation import Augment
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.techniques.early_exit.heads import ExitHeads
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.frozen_layers import FrozenLayers, freeze_layers
from efficient_asr.training.run import run

SETTINGS = {
    "freeze_layers": 1, "features": "cnn", "pretrained_model": None, "train_layerdrop": None, "layer_states_folder": None,
    "spec_augment": False, "spec_augment_masks": 2, "spec_augment_frames": 40,
}  # fmt: skip


def state_after(model: CTCModel, wavs: torch.Tensor, wav_lens: torch.Tensor, layers: int) -> Any:
    state = model.encoder.begin(*model.apply_frontend(wavs, wav_lens))
    for index in range(layers):
        state = model.encoder.run_layer(index, state)
    return state


def batch_of(model: CTCModel, wavs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    return padded, torch.tensor([len(wav) for wav in wavs]) / padded.shape[1]


@pytest.mark.parametrize("kind", ["wav2vec2-base", "wav2vec2-large", "hubert-base", "wavlm-large"])
def test_an_encoder_continues_exactly_from_any_layer(
    kind: str, ssl_sources: dict[str, str], tiny_ctc: CTCModel, wavs: list[torch.Tensor]
) -> None:
    tiny_ctc.encoder = load_encoder(ssl_sources[kind]).eval()
    batch = batch_of(tiny_ctc, wavs)
    with torch.no_grad():
        whole = tiny_ctc.recognise(*batch)
        for layers in range(tiny_ctc.encoder.num_layers + 1):
            done = state_after(tiny_ctc, *batch, layers), layers
            assert torch.equal(tiny_ctc.recognise(*batch, done=done).logits, whole.logits), layers


def test_exit_heads_continue_too(tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    heads = ExitHeads([CTCHead(32, len(tiny_ctc.labels), "none") for _ in range(2)], [1, 2])
    tiny_ctc.head, batch = heads, batch_of(tiny_ctc, wavs)
    whole = tiny_ctc.recognise(*batch, only=[1, 2]).logits
    again = tiny_ctc.recognise(*batch, done=(state_after(tiny_ctc, *batch, 1), 1), only=[1, 2]).logits
    assert torch.equal(whole, again)


def frozen(model: CTCModel, corpus: Path, folder: Path | None, speeds: list[int], **more: Any) -> FrozenLayers:
    rows = read_manifest(corpus / "train.jsonl")
    hparams = SETTINGS | {"augment": Augment(speeds), "layer_states_folder": folder and str(folder)} | more
    return FrozenLayers(model, hparams, rows)


def loaded(rows: Any, wavs: list[torch.Tensor]) -> Any:
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    return SimpleNamespace(
        id=[row["id"] for row in rows],
        wav=type("Wav", (tuple,), {"data": padded})((padded, torch.tensor([len(w) for w in wavs]) / padded.shape[1])),
    )


def test_states_on_the_disk_are_those_of_the_layers(
    tiny_ctc: CTCModel, corpus: Path, tmp_path: Path, wavs: list[torch.Tensor]
) -> None:
    on_disk, computed = (frozen(tiny_ctc, corpus, folder, [100]) for folder in (tmp_path / "states", None))
    on_disk.fill("cpu")
    batch = loaded(on_disk.rows, wavs)
    one, other = on_disk.of_batch(batch), computed.of_batch(batch)
    assert torch.equal(one.frame_lengths, other.frame_lengths) and torch.equal(one.mask, other.mask)
    for a, b, frames in zip(one.states, other.states, one.frame_lengths.tolist(), strict=True):
        torch.testing.assert_close(a[:frames], b[:frames], rtol=1e-3, atol=1e-3)  # half precision
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").glob("??/*")}
    on_disk.fill("cpu")
    assert len(files) == len(wavs) and files == {path: path.stat().st_mtime_ns for path in files}  # once


def test_every_speed_has_its_states(tiny_ctc: CTCModel, corpus: Path, tmp_path: Path, wavs: list[torch.Tensor]) -> None:
    states = frozen(tiny_ctc, corpus, tmp_path / "states", [50, 100])
    states.fill("cpu")
    batch, seen = loaded(states.rows, wavs), set()
    for seed in range(8):
        torch.manual_seed(seed)
        seen.add(tuple(states.of_batch(batch).frame_lengths.tolist()))
    lengths = torch.tensor([len(wav) for wav in wavs])
    wanted = {tuple(tiny_ctc.encoder.frame_lengths(lengths * factor).tolist()) for factor in (1, 2)}
    assert seen == wanted


def test_spans_of_time_are_masked_in_the_states(tiny_ctc: CTCModel, corpus: Path, wavs: list[torch.Tensor]) -> None:
    plain, masked = (frozen(tiny_ctc, corpus, None, [100], spec_augment=value) for value in (False, True))
    batch = loaded(plain.rows, wavs)
    before = plain.of_batch(batch).states
    torch.manual_seed(3)
    after = masked.of_batch(batch).states
    zero = (after == 0).all(dim=2)
    assert zero.any() and torch.equal(after[~zero], before[~zero])


def test_other_weights_need_another_folder(tiny_ctc: CTCModel, corpus: Path, tmp_path: Path) -> None:
    frozen(tiny_ctc, corpus, tmp_path / "states", [100])
    torch.nn.init.zeros_(tiny_ctc.encoder.layers[0].fc1.weight)
    with pytest.raises(Exception, match=r"layer_states_folder: .* differs in weights"):
        frozen(tiny_ctc, corpus, tmp_path / "states", [100])


def test_only_what_follows_the_frozen_layers_is_trained(tiny_ctc: CTCModel) -> None:
    freeze_layers(tiny_ctc, 0)
    assert all(parameter.requires_grad for parameter in tiny_ctc.encoder.layers.parameters())
    freeze_layers(tiny_ctc, 1)
    trained = {name for name, parameter in tiny_ctc.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained if name.startswith("encoder.model.")} == {"layers", "layer_norm"}
    assert not any(name.startswith("encoder.model.layers.0.") for name in trained)
    assert any(name.startswith("head.") for name in trained)


def test_models_with_the_same_lower_layers_share_their_states(tiny_ctc: CTCModel, corpus: Path, tmp_path: Path) -> None:
    frozen(tiny_ctc, corpus, tmp_path / "states", [100])
    torch.nn.init.zeros_(tiny_ctc.encoder.layers[1].fc1.weight)  # of a layer that is trained
    frozen(tiny_ctc, corpus, tmp_path / "states", [100])
    del tiny_ctc.encoder.layers[1]
    frozen(tiny_ctc, corpus, tmp_path / "states", [100])


def train(corpus: Path, out: Path, *options: str) -> int:
    out.mkdir(exist_ok=True)
    yaml = write_tiny_yaml(out / "tiny.yaml", corpus, out)
    yaml.write_text(yaml.read_text().replace("layers: 1", "layers: 2").replace("dropout: 0.0", "dropout: 0.2"))
    short = ("--device", "cpu", "--train_only", "True", "--freeze_layers", "1", "--speeds_percent", "[95, 100]")
    return run(CTCBrain, [str(yaml), *short, "--layer_states_folder", str(out / "states"), *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "output" / "model" / "model.safetensors")


def test_a_training_on_states_goes_on_exactly_and_leaves_the_layers_alone(corpus: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path / "whole") == 0
    assert train(corpus, tmp_path / "parts", "--number_of_epochs", "1") == 0
    half = weights(tmp_path / "parts")
    assert train(corpus, tmp_path / "parts") == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    moved = {name for name in whole if not torch.equal(whole[name], half[name])}
    assert moved and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all(name.startswith(("encoder.model.layers.1.", "encoder.model.layer_norm.", "head.")) for name in moved)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze_layers", "0"], "layer_states_folder: states of frozen layers; set freeze_layers"),
        (["--freeze_layers", "3"], "freeze_layers: 3 layers cannot be frozen, the encoder has 2"),
        (["--train_layerdrop", "0.1"], "train_layerdrop: states on the disk are those of all frozen layers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    options: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(corpus, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err


def test_a_front_end_has_to_learn_with_all_layers(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    out.mkdir()
    yaml = write_tiny_yaml(out / "tiny.yaml", corpus, out)
    yaml.write_text(yaml.read_text() + "frontend: !new:torch.nn.Dropout {}\n")
    assert run(CTCBrain, [str(yaml), "--device", "cpu", "--freeze_layers", "1"]) == 2
    assert "freeze_layers: the front end changes the input" in capsys.readouterr().err
