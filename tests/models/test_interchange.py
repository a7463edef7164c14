"""Models for and from transformers, SpeechBrain and faster-whisper give the same transcripts there as here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import TEXTS, make_corpus, make_wavs
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.lobes.models.VanillaNN import VanillaNN
from torch import nn

from efficient_asr.commands import export
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.interchange.speechbrain import (
    is_speechbrain_checkpoint,
    read_labels,
    start_from_speechbrain,
)
from efficient_asr.techniques.downsampling import Downsampler
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError


def make_model(source: str, frontend: nn.Module | None = None, **options) -> CTCModel:
    """A model whose random head writes something different on each recording."""
    torch.manual_seed(3)
    labels = CharacterLabels.from_texts(TEXTS)
    encoder = load_encoder(source, **{"output_norm": False} | options)
    head = CTCHead(encoder.hidden_size, len(labels), "none")
    nn.init.normal_(head.linear.weight, std=3.0)
    return CTCModel(frontend or nn.Identity(), encoder, head, labels).eval()


def texts_of(model: CTCModel) -> list[str]:
    texts = [CTCTranscriber(model).transcribe(wav)[0].text for wav in make_wavs()]
    assert len({*texts}) > 1 and all(texts)
    return texts


@pytest.mark.parametrize("kind", ["wav2vec2-base", "wav2vec2-large", "hubert-base", "wavlm-base", "wavlm-large"])
def test_transformers_gets_the_same_logits_and_texts(kind: str, ssl_sources: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    model = make_model(ssl_sources[kind])
    del model.encoder.layers[1]  # as after layer removal
    model.save(tmp_path / "model")
    export.main([str(tmp_path / "model"), "--to", "transformers", "--out", str(tmp_path / "out")])
    processor, network = (
        AutoProcessor.from_pretrained(tmp_path / "out"),
        AutoModelForCTC.from_pretrained(tmp_path / "out"),
    )
    assert type(network).__name__.lower().startswith(kind.partition("-")[0])
    texts = []
    for wav in make_wavs():
        values = processor(wav.numpy(), sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            logits = network.eval()(values).logits
            expected = model.recognise(wav[None], torch.ones(1)).logits
        assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))
        texts += processor.batch_decode(logits.argmax(dim=-1))
    assert [" ".join(text.split()) for text in texts] == texts_of(model)


@pytest.mark.parametrize(
    ("frontend", "options", "message"),
    [
        (Downsampler("signal", 2), {}, "a front end"),
        (None, {"output_norm": True}, "output_norm: True"),
    ],
)
def test_what_transformers_has_no_place_for_is_named(
    frontend: nn.Module | None, options: dict, message: str, ssl_sources: dict[str, str], tmp_path: Path
) -> None:
    make_model(ssl_sources["wavlm-base"], frontend, **options).save(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        export.main([str(tmp_path / "model"), "--to", "transformers", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_speechbrain_opens_an_exported_model_of_any_technique(
    ssl_sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speechbrain.inference.ASR import EncoderASR

    monkeypatch.chdir(tmp_path)
    model = make_model(ssl_sources["wavlm-base"], Downsampler("signal", 2))
    model.save(tmp_path / "model")
    export.main([str(tmp_path / "model"), "--to", "speechbrain", "--out", str(tmp_path / "out")])
    asr = EncoderASR.from_hparams(source=str(tmp_path / "out"), savedir=str(tmp_path / "saved"))
    found = []
    for i, wav in enumerate(make_wavs()):
        soundfile.write(tmp_path / f"{i}.wav", wav.numpy(), 16000, subtype="FLOAT")
        found.append(" ".join(asr.transcribe_file(str(tmp_path / f"{i}.wav")).split()))
    assert found == texts_of(model)
    wavs = nn.utils.rnn.pad_sequence(make_wavs(), batch_first=True)
    together, _ = asr.transcribe_batch(wavs, torch.tensor([len(w) / wavs.shape[1] for w in make_wavs()]))
    assert [" ".join(text.split()) for text in together] == found


@pytest.fixture
def checkpoint(ssl_sources: dict[str, str], tmp_path: Path) -> Path:
    """What SpeechBrain's wav2vec 2.0 CTC recipe leaves: encoder, block and linear layer, labels in capitals."""
    torch.manual_seed(5)
    encoder = load_encoder(ssl_sources["wav2vec2-base"], output_norm=False)
    folder = tmp_path / "save" / "CKPT+1"
    folder.mkdir(parents=True)
    labels = CTCTextEncoder()
    labels.insert_blank(index=0)
    labels.add_bos_eos()
    labels.update_from_iterable(sorted({*"".join(TEXTS).upper()}, reverse=True), sequence_input=False)
    labels.save(tmp_path / "save" / "label_encoder.txt")
    enc = VanillaNN([None, None, 32], nn.LeakyReLU, 2, 24)
    out = nn.ModuleDict({"w": nn.Linear(24, len(labels))})
    nn.init.normal_(out["w"].weight, std=2.0)
    torch.save({f"model.{k}": v for k, v in encoder.model.state_dict().items()}, folder / "wav2vec2.ckpt")
    torch.save(nn.ModuleList([enc, out]).state_dict(), folder / "model.ckpt")
    return folder


def test_a_speechbrain_checkpoint_is_taken_over(checkpoint: Path, ssl_sources: dict[str, str]) -> None:
    assert is_speechbrain_checkpoint(checkpoint) and not is_speechbrain_checkpoint(checkpoint.parent)
    labels, rows = read_labels(checkpoint)
    assert labels.characters[0] == " " and "".join(labels.characters).islower() and rows[0] == 0
    encoder = load_encoder(ssl_sources["wav2vec2-base"], output_norm=False)
    model = CTCModel(nn.Identity(), encoder, CTCHead(32, len(labels), "feedforward", 24, 2), labels).eval()
    assert start_from_speechbrain(model, checkpoint) == []
    # SpeechBrain's own computation, on the outputs for our labels.
    enc, out = VanillaNN([None, None, 32], nn.LeakyReLU, 2, 24), nn.ModuleDict({"w": nn.Linear(24, len(rows) + 2)})
    nn.ModuleList([enc, out]).load_state_dict(torch.load(checkpoint / "model.ckpt", weights_only=True))
    wav = make_wavs()[0][None]
    with torch.no_grad():
        states = encoder(wav, torch.tensor([wav.shape[1]])).states
        expected = out["w"](enc(states))[:, :, rows]
        assert torch.equal(model.recognise(wav, torch.ones(1)).logits, expected)


def test_a_checkpoint_of_another_encoder_or_with_code_is_refused(checkpoint: Path, ssl_sources: dict[str, str]) -> None:
    labels, _ = read_labels(checkpoint)
    encoder = load_encoder(ssl_sources["wavlm-base"], output_norm=False)
    model = CTCModel(nn.Identity(), encoder, CTCHead(32, len(labels), "none"), labels)
    with pytest.raises(UserError, match="does not match `source`"):
        start_from_speechbrain(model, checkpoint)
    torch.save({"x": print}, checkpoint / "wav2vec2.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of weights"):
        start_from_speechbrain(model, checkpoint)
    (checkpoint.parent / "label_encoder.txt").write_bytes(b"\x0a\x0e\x80\xff\xfe units")
    with pytest.raises(UserError, match="subword units"):
        read_labels(checkpoint)
    (checkpoint.parent / "label_encoder.txt").unlink()
    with pytest.raises(UserError, match="has no labels"):
        read_labels(checkpoint)


def test_faster_whisper_opens_an_exported_whisper(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    if importlib.util.find_spec("ctranslate2") is None:
        with pytest.raises(UserError, match="pip install 'efficient_asr\\[ctranslate2\\]'"):
            export.main([tiny_whispers["small"], "--to", "faster-whisper", "--out", str(tmp_path / "out")])
        return
    export.main([tiny_whispers["small"], "--to", "faster-whisper", "--out", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"model.bin", "tokenizer.json", "preprocessor_config.json"}


def test_an_existing_folder_and_a_wrong_kind_are_refused(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; choose another folder"):
        export.main([tiny_whispers["small"], "--to", "speechbrain", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is not a CTC model of efficient_asr"):
        export.main([tiny_whispers["small"], "--to", "speechbrain", "--out", str(tmp_path / "out")])
    out, manifest = tmp_path / "out", make_corpus(tmp_path / "corpus") / "test.jsonl"
    for options, message in (
        (["--manifest", "none.jsonl"], "none.jsonl"), (["--manifest", str(manifest), "--language", "German"], "'de'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            export.main([tiny_whispers["small"], "--to", "transformers", "--out", str(out), *options])
        assert not out.exists()  # nothing was exported in vain
