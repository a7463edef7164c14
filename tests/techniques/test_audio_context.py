"""Audio context: the loss in closed form, identity, targets on the disk, training without texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import ROOT_TAG
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.data import absolute_lengths, load_row, pad_wavs, read_manifest
from efficient_asr.evaluation.result import Result
from efficient_asr.models.sources import resolve_source
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.audio_context.brain import AudioContextBrain
from efficient_asr.techniques.audio_context.context import AudioContext, States, context_loss
from efficient_asr.techniques.audio_context.targets import Targets, audio_positions, file_name
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError

MINI = "efficient_asr:mini_whisper_small"
YAML = """
base: !include:{root}/hparams/_base/audio_context.yaml
experiment: tiny_context
source: {source}
corpus: jsonl
data_folder: {corpus}
prepared_folder: {out}/prepared
output_folder: {out}/output
training_padding_s: [0.0, 0.2]
context_padding_s: 0.1
number_of_epochs: 2
batch_size: 2
lr: 0.001
test_normaliser: plain
runtime_repeats: 1
retry_logprob: null
"""


def states(seed: int) -> States:
    generator = np.random.default_rng(seed)
    shapes = (2, 5, 3), (2, 4, 2, 3), (2, 4, 7)
    return States(*(torch.from_numpy(generator.normal(0, 1, shape)) for shape in shapes))


def test_loss_is_its_closed_form() -> None:
    student, teacher = states(0), states(1)
    positions = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    tokens = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    e = ((student.encoder - teacher.encoder) ** 2).numpy()[positions.numpy()].sum() / (8 * 3)
    d = ((student.decoder - teacher.decoder) ** 2).numpy()[tokens.numpy()].sum() / (6 * 2 * 3)
    p, q = (each.logits.log_softmax(-1).numpy()[tokens.numpy()] for each in (teacher, student))
    kl = (np.exp(p) * (p - q)).sum() / 6
    for weights in ((1.0, 1.0, 1.0), (0.5, 0.0, 2.0), (0.0, 3.0, 0.0)):
        found = context_loss(student, teacher, positions, tokens, weights)
        np.testing.assert_allclose(float(found), np.dot(weights, [e, d, kl]), rtol=1e-12)
    assert float(context_loss(teacher, teacher, positions, tokens, (1.0, 1.0, 1.0))) == 0.0
    student.encoder[0, 3:] = 1e6  # padding does not matter
    student.decoder[0, 2:] = 1e6
    np.testing.assert_allclose(
        float(context_loss(student, teacher, positions, tokens, (1.0, 1.0, 0.0))), e + d, rtol=1e-12
    )


def test_all_of_the_window_is_the_plain_model_bit_for_bit(
    tiny_whispers: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    whisper = Whisper.from_source(tiny_whispers["large"])
    batch, lengths = pad_wavs(wavs[:2])[0], torch.tensor([len(wav) for wav in wavs[:2]])
    with torch.no_grad():
        plain = whisper.encode(batch, lengths)
        whisper.encoder_padding = AudioContext(2.0)  # the window of this model
        assert torch.equal(whisper.encode(batch, lengths).states, plain.states)
        whisper.encoder_padding = AudioContext(0.1)
        assert whisper.encode(batch, lengths).states.shape[1] < plain.states.shape[1]


def test_states_of_the_forward_pass_are_those_of_transformers(
    tiny_whispers: dict[str, str], wavs: list[torch.Tensor]
) -> None:
    whisper = Whisper.from_source(tiny_whispers["large"])
    batch, lengths = pad_wavs(wavs[:2])[0], torch.tensor([len(wav) for wav in wavs[:2]])
    tokens = torch.tensor([[whisper.labels.start, 5, 6, 7], [whisper.labels.start, 9, 8, 7]])
    with torch.no_grad():
        encoder, decoder, logits = whisper(batch, lengths, tokens, with_states=True)
        out = whisper.network(whisper.features(batch, lengths), decoder_input_ids=tokens, output_hidden_states=True)
    torch.testing.assert_close(encoder, out.encoder_last_hidden_state)
    torch.testing.assert_close(decoder, torch.stack(out.decoder_hidden_states, dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def audio(tmp_path: Path, wavs: list[torch.Tensor]) -> Path:
    """Audio without texts for training and validation; the test set has texts."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rows = []
    for i, wav in enumerate(wavs):
        soundfile.write(folder / f"{i}.wav", wav.numpy(), 16000)
        rows.append({"id": str(i), "audio": f"{i}.wav", "duration": len(wav) / 16000})
    for split, more in (("train", {}), ("dev", {}), ("test", {"text": "nine"})):
        lines = [json.dumps(row | more) + "\n" for row in (rows[:1] if split == "dev" else rows)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def test_targets_continue_and_follow_the_audio(audio: Path, tmp_path: Path, tiny_whispers: dict[str, str]) -> None:
    teacher, rows = Whisper.from_source(tiny_whispers["large"]), read_manifest(audio / "train.jsonl", need_text=False)
    targets, options = Targets(tmp_path / "targets", {"model": "a"}), DecodingOptions()
    assert targets.fill(teacher, rows[:3], options, "cpu") == 3
    assert targets.fill(teacher, rows, options, "cpu") == 1 and targets.fill(teacher, rows, options, "cpu") == 0
    heard = load_transcriber(tiny_whispers["large"], language="en").transcribe_files([row["audio"] for row in rows])
    assert [row["text"] for row in targets.with_text(rows, teacher)] == [one.text for one in heard]
    encoder, decoder = targets.read([file_name(rows[i], "en") for i in (0, 2)])
    lengths = torch.tensor([round(rows[i]["duration"] * 16000) for i in (0, 2)])
    assert encoder.shape[1] == int(audio_positions(teacher, lengths).max()) and decoder.shape[2] == 2
    soundfile.write(audio / "0.wav", np.zeros(16000, dtype=np.float32) + 0.1, 16000)
    assert targets.fill(teacher, rows, options, "cpu") == 1
    # a part of another file with the id of the first one is another target
    (audio / "others.jsonl").write_text(
        json.dumps({"id": "0", "audio": "3.wav", "duration": 0.5, "offset": 0.1}) + "\n"
    )
    others = read_manifest(audio / "others.jsonl", need_text=False)
    assert targets.fill(teacher, others, options, "cpu") == 1 and targets.fill(teacher, rows, options, "cpu") == 0
    assert targets.read([file_name(others[0], "en")])[0].shape[1] == 25 != encoder.shape[1]
    with pytest.raises(UserError, match=r"targets_folder: .* differs in model"):
        Targets(tmp_path / "targets", {"model": "b"})


def test_targets_are_the_states_of_the_teacher_and_its_own_loss_is_zero(
    audio: Path, tmp_path: Path, tiny_whispers: dict[str, str]
) -> None:
    """A student that still is the teacher, and hears the whole window, has nothing to learn; one that hears less has."""
    teacher, rows = Whisper.from_source(tiny_whispers["large"]), read_manifest(audio / "train.jsonl", need_text=False)
    targets = Targets(tmp_path / "targets", {"model": "a"})
    targets.fill(teacher, rows, DecodingOptions(), "cpu")
    names = [file_name(row, "en") for row in rows]
    wavs, wav_lens = pad_wavs([load_row(row) for row in rows])
    rows_of_tokens = [targets.store.read(name, "tokens")["tokens"].long() for name in names]
    tokens = torch.nn.utils.rnn.pad_sequence(rows_of_tokens, batch_first=True)
    token_lens = torch.tensor([len(row) for row in rows_of_tokens]) / tokens.shape[1]
    batch = SimpleNamespace(id=names, wav=(wavs, wav_lens), tokens=(tokens, token_lens))
    student = Whisper.from_source(tiny_whispers["large"])
    brain = object.__new__(type("Bare", (AudioContextBrain,), {"model": student}))
    brain.targets, brain.names, brain.device = targets, {name: name for name in names}, torch.device("cpu")
    brain.teacher_output = teacher.network.proj_out.weight.detach()
    losses = {}
    for padding_s in (2.0, 0.05):  # the window, and little silence
        student.encoder_padding = AudioContext(padding_s)
        with torch.no_grad():
            found = States(*student(wavs, absolute_lengths(wavs, wav_lens), tokens[:, :-1], with_states=True))
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            names_of = ("encoder_weight", "decoder_weight", "logits_weight")
            brain.hparams = SimpleNamespace(**dict(zip(names_of, weights, strict=True)))
            losses[padding_s, weights] = float(brain.compute_objectives(found, batch, sb.Stage.TRAIN))
    for weights in {weights for _, weights in losses}:  # what is left is half precision on the disk
        assert losses[2.0, weights] < 0.02 * losses[0.05, weights], (weights, losses)


def test_training_needs_no_texts_and_its_model_opens_anywhere(
    audio: Path, tmp_path: Path, tiny_whispers: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    yaml = tmp_path / "context.yaml"
    yaml.write_text(YAML.format(root=ROOT_TAG, source=tiny_whispers["large"], corpus=audio, out=tmp_path))
    assert run(AudioContextBrain, [str(yaml)], "audio_context") == 0
    assert "ran the teacher on 4 utterances" in capsys.readouterr().out
    result = Result.load(tmp_path / "output" / "results" / "tiny_context.json")
    assert result.technique == "audio_context" and result.variant == "audio context + 0.1 s"
    assert result.details["audio_s"] == pytest.approx(4.147, abs=1e-3) and result.details["encoder_s"] < 1.3
    transcriber = load_transcriber(tmp_path / "output" / "model", language="en")
    assert transcriber.model.encoder_padding.padding_s == 0.1
    assert load_transcriber(tmp_path / "output" / "model", padding_s=0.3).model.encoder_padding.padding_s == 0.3
    before, after = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (tiny_whispers["large"], tmp_path / "output" / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder.layer_norm" in name for name in changed)
    assert changed and all(".layers." in name or "encoder.layer_norm" in name for name in changed)
    log = (tmp_path / "output" / "train_log.txt").read_text()
    assert "epoch: 2" in log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained_layers": "decoders"}, "trained_layers: 'decoders' is not one of all, encoder, layers"),
        ({"training_padding_s": 0.5}, "training_padding_s: 0.5 is not a range"),
        ({"encoder_weight": 0.0, "decoder_weight": 0.0, "logits_weight": 0.0}, "there is nothing to learn"),
        ({"freeze_encoder": True}, "freeze_encoder: it is the encoder that must learn"),
        ({"source": None}, "source: this recipe adapts a trained Whisper"),
        ({"augment": SimpleNamespace(speed=1, rirs=[], noises=[])}, "the teacher heard the audio unchanged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    settings = {
        "source": resolve_source(MINI), "trained_layers": "layers", "training_padding_s": [0.0, 1.0], "encoder_weight": 1.0,
        "decoder_weight": 1.0, "logits_weight": 1.0, "freeze_encoder": False,
        "augment": SimpleNamespace(speed=None, rirs=[], noises=[]),
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        AudioContextBrain.build(settings | change, None)
