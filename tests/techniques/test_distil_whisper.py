"""Distil-Whisper: objective, targets, stored encoder states, and what the public implementation got wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import speechbrain as sb
import torch
from conftest import PLACES, ROOT_TAG, TEXTS, multilingual_whisper
from runs import torchrun
from safetensors.torch import load_file

from efficient_asr import load_transcriber
from efficient_asr.data import Rows, load_row, read_manifest
from efficient_asr.evaluation.wer import count_errors, error_rate_percent
from efficient_asr.models.whisper.labels import WhisperLabels
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distil_whisper.brain import StudentBrain, _made_before, matched_layers
from efficient_asr.techniques.distil_whisper.states import EncoderStates
from efficient_asr.techniques.distil_whisper.targets import is_chosen, with_targets
from efficient_asr.techniques.distillation.losses import TeacherDistribution, kl_divergence, weighted_loss
from efficient_asr.techniques.pruning import prune
from efficient_asr.text.normalise import normalise_plain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError

YAML = (
    PLACES
    + """
base: !include:{root}/hparams/_base/distil_whisper.yaml
experiment: student
source: {source}
decoder_layers: 1
test_normaliser: plain
number_of_epochs: 2
batch_size: 2
lr: 0.003
runtime_repeats: 1
measure_runtime: False
"""
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    multilingual_whisper(3, layers=3, max_tokens=40).save(folder)
    return str(folder)


def train(corpus: Path, out: Path, source: str, *options: str) -> int:
    out.mkdir(exist_ok=True)
    (out / "x.yaml").write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=out, source=source))
    return run(StudentBrain, [str(out / "x.yaml"), "--device", "cpu", *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "output" / "model" / "model.safetensors")


# ------------------------------------------------------------ objective


@pytest.mark.parametrize(("ce", "kl"), [(0.8, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_weights_are_those_of_the_yaml(ce: float, kl: float) -> None:
    generator = np.random.default_rng(0)
    teacher, student = (torch.from_numpy(generator.normal(0, 2, (2, 3, 7))) for _ in range(2))
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    loss = weighted_loss("kl", 2.0, ce, kl)
    t, s = (x.numpy() / 2 for x in (teacher, student))
    t, s = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (t, s))
    divergence = 4 * (np.exp(t) * (t - s)).sum(-1)[real.numpy()].mean()
    found = loss.divergence(TeacherDistribution(torch.from_numpy(t)), student, real)
    np.testing.assert_allclose(float(found), divergence, rtol=1e-6)
    total = loss(torch.tensor(1.7, dtype=torch.float64), torch.tensor(divergence))
    np.testing.assert_allclose(float(total), ce * 1.7 + kl * divergence, rtol=1e-6)
    assert float(kl_divergence(torch.from_numpy(t), torch.from_numpy(t)).abs().max()) == 0.0


def test_hidden_states_are_matched_with_those_before_the_next_kept_layer(teacher: str) -> None:
    """Layers 1 and 3 of 3 are kept: the first answers for teacher layers 1 and 2, the second for all."""
    brain = object.__new__(StudentBrain)
    states = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (2, 5, 4, 6)))  # [batch, tokens, layers + 1, dim]
    whole = Whisper.from_source(teacher)
    student = prune(Whisper.from_source(teacher), -1, 2)
    brain.teacher, brain.matched = object(), matched_layers(student, whole, 2)
    assert brain.matched == [2, 3] == matched_layers(student, whole, -1)  # -1: made before
    brain.hparams = SimpleNamespace(hidden_weight=0.5)
    brain.teacher_states = list(states.unbind(dim=2))
    brain.student_states = torch.zeros(2, 5, 3, 6, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    brain.predicted = lambda batch: real
    matched = states[:, :, [2, 3]]
    expected = 0.5 * float(matched[real].pow(2).mean())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentBrain.__mro__[1], "compute_objectives", lambda *_: torch.zeros((), dtype=torch.float64))
        found = float(brain.compute_objectives(None, None, sb.Stage.TRAIN))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--source", "null"), "source"),
        (("--teacher", "null", "--ce_weight", "0"), "nothing to learn"),
        (("--hidden_weight", "1.0", "--teacher", "null"), "hidden_weight"),
        (("--encoder_states_folder", "x", "--freeze_encoder", "False"), "freeze_encoder"),
        (("--encoder_states_folder", "x", "--speeds_percent", "[90, 100]"), "speeds_percent"),
        (("--encoder_layers", "2"), "an encoder with fewer layers has to learn"),
        (("--spec_augment", "True"), "the teacher would hear the masks too"),
        (("--train_normaliser", "plain", "--timestamp_probability", "0.5"), "timed segments are not normalised"),
        (("--previous_text_probability", "0.5"), "no utterance has a `speaker`"),
        (("--sigma", "[1.0, 1.0]"), "ce_weight and kl_weight"),
        (("--decoder_layers", "9"), "decoder_layers: expected a number from 1 to 3"),
        (("--timestamp_probability", "1.5"), "timestamp_probability"),
    ],
)
def test_settings_that_make_no_sense(
    options: tuple[str, ...],
    message: str,
    corpus: Path,
    tmp_path: Path,
    teacher: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(corpus, tmp_path / "a", teacher, *options) == 2
    assert message in capsys.readouterr().err


def test_a_language_other_than_that_of_the_labels_is_refused(
    corpus: Path, tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be trained in its own and tested in the other one."""
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    (corpus / "train.jsonl").write_text("".join(json.dumps(row | {"language": "German"}) + "\n" for row in rows))
    assert train(corpus, tmp_path / "a", teacher, "--language", "en") == 2
    assert "it is en, but the training manifest says de (4 utterances); set it to manifest" in capsys.readouterr().err
    options = ("--train_only", "True", "--number_of_epochs", "1")
    assert train(corpus, tmp_path / "a", teacher, *options, "--language", "de") == 0
    assert train(corpus, tmp_path / "b", teacher, *options) == 0  # manifest


def test_a_student_that_was_made_before_is_known(
    corpus: Path, tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Whisper.from_source(teacher)
    model.reset_metadata()
    prune(model, -1, [1, 2])
    model.save(tmp_path / "student", {"technique": None, "details": model.history})
    keep = ("--decoder_layers", "-1", "--train_only", "True", "--number_of_epochs", "1")
    assert train(corpus, tmp_path / "a", str(tmp_path / "student"), *keep) == 2
    assert "teacher: the source is a student itself" in capsys.readouterr().err
    assert _made_before(str(tmp_path / "student")) == {"kept_decoder_layers": [1, 2]} and _made_before(teacher) == {}
    # the second layer was kept: the first answers for itself, the second for the rest
    assert matched_layers(model, Whisper.from_source(teacher), [1, 2]) == [1, 3]
    options = ("--teacher", teacher, "--hidden_weight", "1.0")
    assert train(corpus, tmp_path / "b", str(tmp_path / "student"), *keep, *options) == 0
    trained = str(tmp_path / "b" / "output" / "model")  # trained on: not against itself
    capsys.readouterr()
    assert train(corpus, tmp_path / "c", trained, *keep) == 2
    assert "teacher: the source is a student itself" in capsys.readouterr().err
    with pytest.raises(UserError, match="hidden_weight: 3 layers of width 16 cannot be matched with 2"):
        matched_layers(Whisper.from_source(teacher), Whisper.from_source(trained), -1)

    prune(model, 2, -1)
    model.save(tmp_path / "cut", {"technique": None, "details": model.history})
    assert train(corpus, tmp_path / "c", str(tmp_path / "cut"), *keep, "--teacher", teacher) == 2
    assert "an encoder with fewer layers has to learn" in capsys.readouterr().err
    options = ("--teacher", teacher, "--freeze_encoder", "False")
    assert train(corpus, tmp_path / "c", str(tmp_path / "cut"), *keep, *options) == 0


# ------------------------------------------------------------ targets


def timed_whisper() -> Whisper:
    """A Whisper whose tokenizer has timestamps."""
    model = multilingual_whisper(0, max_tokens=60)
    model.labels.timestamp_tokens = range(500, 601)  # 2 s
    return model


def test_it_trains_with_times_and_previous_texts(
    corpus: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Whisper.from_source(teacher)
    first = model.labels.generation.no_timestamps_token_id + 1
    assert not model.labels.timestamp_tokens
    model.network.resize_token_embeddings(first + 101)  # 0 to 2 s
    model.save(tmp_path / "timed")
    lines = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    segments = [[{"start_s": 0.0, "end_s": 0.5, "text": row["text"]}] for row in lines]
    lines = [row | {"speaker": "a", "segments": own} for row, own in zip(lines, segments, strict=True)]
    (corpus / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    seen: list[list[int]] = []
    encode = WhisperLabels.encode_row
    monkeypatch.setattr(WhisperLabels, "encode_row", lambda self, row: seen.append(encode(self, row)) or seen[-1])
    options = ("--timestamp_probability", "1.0", "--previous_text_probability", "1.0", "--num_workers", "0")
    only = ("--train_only", "True", "--number_of_epochs", "1")
    assert train(corpus, tmp_path / "a", str(tmp_path / "timed"), *options, *only) == 0
    previous = model.labels.tokenizer.convert_tokens_to_ids("<|startofprev|>")
    assert any({first, first + 25} <= {*tokens} for tokens in seen) and any(tokens[0] == previous for tokens in seen)
    assert train(corpus, tmp_path / "b", teacher, *options, *only) == 2
    assert "timestamp_probability: this Whisper has no timestamps" in capsys.readouterr().err


def test_targets_depend_only_on_id_and_seed() -> None:
    names = [f"u{i}" for i in range(4000)]
    chosen = [is_chosen(name, "timestamps", 0.5, 1) for name in names]
    assert chosen == [is_chosen(name, "timestamps", 0.5, 1) for name in names] and 0.47 < np.mean(chosen) < 0.53
    assert chosen != [is_chosen(name, "timestamps", 0.5, 2) for name in names]
    assert not any(is_chosen(name, "x", 0.0, 1) for name in names) and all(
        is_chosen(name, "x", 1.0, 1) for name in names
    )


def test_tokens_of_targets() -> None:
    labels = timed_whisper().labels
    segments = [{"start_s": 0.0, "end_s": 0.5, "text": "one"}, {"start_s": 0.52, "end_s": 9.0, "text": "two"}]
    row = {"id": "a", "text": " one two", "language": "de", "segments": segments}

    def own(text: str) -> list[int]:
        return labels.tokenizer(text, add_special_tokens=False).input_ids

    task, de = labels.generation.task_to_id["transcribe"], labels.languages["de"]
    plain = labels.encode_row(row)
    assert plain == [labels.start, de, task, labels.generation.no_timestamps_token_id, *own(" one two"), labels.end]
    timed = labels.encode_row(row | {"timed": True})
    assert timed == [
        labels.start,
        de,
        task,
        500,
        *own(" one"),
        525,
        526,
        *own(" two"),
        600,
        labels.end,
    ]  # cut at the window
    before = labels.encode_row(row | {"previous_text": " nine"})
    assert before == [labels.tokenizer.convert_tokens_to_ids("<|startofprev|>"), *own(" nine"), *plain]
    long = labels.encode_row(row | {"previous_text": " nine" * 100})
    assert (
        len(long) <= 60
        and long[-len(plain) :] == plain
        and long[1 : -len(plain)] == own(" nine" * 100)[-len(long) + len(plain) + 1 :]
    )
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([torch.tensor(x) for x in (plain, timed, before)], batch_first=True)
    assert labels.text_start(tokens).tolist() == [4, 3, 4 + len(before) - len(plain)]


def test_scripts_without_spaces_get_no_space_in_front() -> None:
    rows = Rows.of([{"id": "a", "duration": 1.0, "text": "今天天气"}, {"id": "b", "duration": 1.0, "text": " heute"}])
    assert [row["text"] for row in with_targets(rows, 0.0, 0.0, 0)] == ["今天天气", " heute"]


def test_layers_that_do_not_correspond_are_refused(teacher: str) -> None:
    whole, other = Whisper.from_source(teacher), multilingual_whisper(0, d_model=32, layers=2)
    with pytest.raises(UserError, match="hidden_weight: 2 layers of width 32 cannot be matched with 3 of width 16"):
        matched_layers(other, whole, -1)
    with pytest.raises(UserError, match="hidden_weight"):
        matched_layers(prune(Whisper.from_source(teacher), -1, 2), whole, [1])


def test_previous_texts_are_those_of_the_same_speaker() -> None:
    rows = Rows.of([{"id": f"u{i}", "duration": 1.0, "text": f"t{i}", "speaker": s} for i, s in enumerate("aabb")])
    rows = with_targets(rows, 1.0, 1.0, 0)
    assert [row.get("previous_text") for row in rows] == [None, " t0", None, " t2"]
    assert [row["text"] for row in rows] == [" t0", " t1", " t2", " t3"] and not any(row["timed"] for row in rows)


# ------------------------------------------------------------ encoder states


def test_stored_states_are_those_of_the_encoder(teacher: str, corpus: Path, tmp_path: Path) -> None:
    model, rows = Whisper.from_source(teacher), read_manifest(corpus / "train.jsonl")
    store = EncoderStates(tmp_path / "states", model, rows)
    store.fill("cpu")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "states").rglob("*.safetensors")}
    assert len(written) == 4
    wavs = [load_row(row) for row in rows]
    with torch.no_grad():
        expected = torch.cat([model.encode(wav[None], torch.tensor([len(wav)])).states for wav in wavs])
    torch.testing.assert_close(store.read([row["id"] for row in rows]), expected.half().float(), rtol=0, atol=0)
    EncoderStates(tmp_path / "states", model, rows).fill("cpu")  # nothing is missing
    assert {p: p.stat().st_mtime_ns for p in written} == written
    other = multilingual_whisper(9, layers=3)
    with pytest.raises(UserError, match="differs in encoder"):
        EncoderStates(tmp_path / "states", other, rows)


# ------------------------------------------------------------ training; defects of the public implementation


def test_the_encoder_stays_and_the_decoder_learns(corpus: Path, tmp_path: Path, teacher: str) -> None:
    assert train(corpus, tmp_path / "a", teacher) == 0
    before, after = load_file(f"{teacher}/model.safetensors"), weights(tmp_path / "a")
    encoder = [name for name in before if name.startswith("model.encoder.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    decoder = [name for name in after if name.startswith("model.decoder.layers.")]
    assert decoder and all("layers.0." in name for name in decoder)
    assert not any(torch.equal(before[name], after[name]) for name in decoder if name.endswith("weight"))
    config = json.loads((tmp_path / "a/output/model/config.json").read_text())
    assert config["about"]["technique"] == "distil_whisper" and config["about"]["details"]["kept_decoder_layers"] == [1]
    result = json.loads((tmp_path / "a/results/student.json").read_text())  # the test set is scored
    assert result["split"] == "test" and result["wer_percent"] is not None and result["variant"] == "student 3-1"


@pytest.mark.parametrize(
    "options",
    [
        ("--encoder_states_folder", "{out}/states"),
        ("--teacher_cache", "{out}/cache"),
        ("--hidden_weight", "1.0"),
        ("--freeze_encoder", "False", "--kl_weight", "0"),
        ("--teacher", "null"),
    ],
)
def test_it_trains_in_every_form(options: tuple[str, ...], corpus: Path, tmp_path: Path, teacher: str) -> None:
    given = [option.format(out=tmp_path) for option in options]
    assert train(corpus, tmp_path / "a", teacher, "--number_of_epochs", "1", "--train_only", "True", *given) == 0
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "a").values())


def test_one_encoder_serves_both_and_gives_the_same_loss(
    corpus: Path, tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--train_only", "True", "--number_of_epochs", "1")
    assert train(corpus, tmp_path / "shared", teacher, *only) == 0
    assert "shares the encoder" in capsys.readouterr().out
    monkeypatch.setattr(Whisper, "has_encoder_of", lambda *_: False)
    assert train(corpus, tmp_path / "apart", teacher, *only) == 0
    assert "runs its own encoder" in capsys.readouterr().out
    stored, cached = ("--encoder_states_folder", str(tmp_path / "states")), ("--teacher_cache", str(tmp_path / "cache"))
    assert train(corpus, tmp_path / "stored", teacher, *only, *stored) == 0
    assert train(corpus, tmp_path / "cached", teacher, *only, *cached, "--teacher_entries", "2000") == 0
    for name, value in weights(tmp_path / "shared").items():
        torch.testing.assert_close(value, weights(tmp_path / "apart")[name], rtol=0, atol=1e-6)
    losses = {
        name: (tmp_path / name / "output/train_log.txt").read_text().split("train loss: ")[1].split()[0]
        for name in ("shared", "apart", "stored", "cached")
    }
    assert len({*losses.values()}) == 1, (
        losses
    )  # two decimals; states and distributions lie on the disk in half precision


def test_the_cache_of_the_teacher_is_filled_from_stored_states(
    corpus: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--train_only", "True", "--number_of_epochs", "1", "--teacher_entries", "2000", "--teacher_cache")
    assert train(corpus, tmp_path / "a", teacher, *only, str(tmp_path / "a_cache")) == 0
    calls, original = [], Whisper.encode

    def encode(self: Whisper, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Whisper, "encode", encode)
    states = ("--encoder_states_folder", str(tmp_path / "states"))
    assert train(corpus, tmp_path / "b", teacher, *only, str(tmp_path / "b_cache"), *states) == 0
    assert len({*map(id, calls)}) == 1  # the student's, which fills the states
    names = [path.relative_to(tmp_path / "a_cache") for path in (tmp_path / "a_cache").glob("??/*.safetensors")]
    assert len(names) == 4
    for name in names:
        a, b = (load_file(tmp_path / folder / name) for folder in ("a_cache", "b_cache"))
        torch.testing.assert_close(a["log_probs"], b["log_probs"], rtol=0, atol=0.02)  # half precision, twice


def test_learning_rate_is_that_of_the_yaml(corpus: Path, tmp_path: Path, teacher: str) -> None:
    """The public implementation ignores it."""
    only = ("--train_only", "True", "--number_of_epochs", "1")
    moved = {}
    for lr in ("0.0", "0.001", "0.01"):
        assert train(corpus, tmp_path / lr, teacher, *only, "--lr", lr) == 0
        name = "model.decoder.layers.0.fc1.weight"
        moved[lr] = float((weights(tmp_path / lr)[name] - load_file(f"{teacher}/model.safetensors")[name]).abs().max())
    assert moved["0.0"] == 0.0 and 0 < moved["0.001"] < moved["0.01"] / 5


def test_all_decoder_layers_can_stay(corpus: Path, tmp_path: Path, teacher: str) -> None:
    """-1 does not work in the public implementation. The student starts as the teacher: their divergence is 0."""
    only = (
        "--train_only",
        "True",
        "--number_of_epochs",
        "1",
        "--decoder_layers",
        "-1",
        "--ce_weight",
        "0.0",
        "--lr",
        "0.0",
    )
    assert train(corpus, tmp_path / "a", teacher, *only) == 0
    assert sum("decoder.layers.2." in name for name in weights(tmp_path / "a")) > 0
    log = (tmp_path / "a/output/train_log.txt").read_text()
    assert "train loss: 0.00" in log or "train loss: 1.00e-0" in log or "train loss: 0" in log, log


def test_another_language_has_its_own_prompt_and_normaliser(corpus: Path, tmp_path: Path, teacher: str) -> None:
    """The public implementation only knows Mandarin and a column called `path`."""
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()]
        renamed = [{"path": row["audio"], "sentence": row["text"], "locale": "de", "id": row["id"]} for row in rows]
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = "{columns: {audio: path, text: sentence, language: locale}}"
    given: tuple[Any, ...] = ("--corpus_options", columns, "--number_of_epochs", "1", "--test_normaliser", "null")
    assert train(corpus, tmp_path / "a", teacher, *given) == 0
    result = json.loads((tmp_path / "a/results/student.json").read_text())
    assert result["utterances"] == len(TEXTS)
    assert result["normaliser"] == "multilingual"
    config = json.loads((tmp_path / "a/output/model/config.json").read_text())
    labels = Whisper.from_source(str(tmp_path / "a/output/model")).labels
    assert config["about"]["recipe"] == "distil_whisper" and labels.languages["de"] != labels.languages["en"]
    rows = with_targets(read_manifest(tmp_path / "a/prepared/train.jsonl"), 0.0, 0.0, 1986)
    assert labels.encode_row(rows[0])[1] == labels.languages["de"]


def test_validation_wer_is_that_of_all_words(corpus: Path, tmp_path: Path, teacher: str) -> None:
    """The public implementation averages the rates of its batches."""
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    texts = ("a", "b b b b b b b b b b b b", "c", "d d d d")  # nothing of this will be heard
    lines = [json.dumps(row | {"text": text}) for row, text in zip(rows, texts, strict=True)]
    (corpus / "dev.jsonl").write_text("\n".join(lines) + "\n")
    options = ("--train_only", "True", "--number_of_epochs", "1", "--lr", "0.0", "--test_batch_size", "1")
    assert train(corpus, tmp_path / "a", teacher, *options) == 0
    logged = float((tmp_path / "a/output/train_log.txt").read_text().split("valid wer_percent: ")[1].split()[0])
    transcriber = load_transcriber(str(tmp_path / "a/output/model"), language="en", max_tokens_per_s=None)
    found = [transcriber.transcribe(load_row(row))[0].text for row in read_manifest(corpus / "dev.jsonl")]
    errors = count_errors(list(texts), [normalise_plain(text) for text in found])
    rates = [error_rate_percent([error]) for error in errors]
    assert logged == pytest.approx(error_rate_percent(errors), rel=0.01)
    assert abs(logged - np.mean(rates)) > 5  # so that it makes a difference


@pytest.mark.slow
@pytest.mark.parametrize("folders", [False, True])
def test_two_processes_train_one_student(corpus: Path, tmp_path: Path, teacher: str, folders: bool) -> None:
    (tmp_path / "x.yaml").write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=tmp_path, source=teacher))
    options = ["--train_only", "True", "--number_of_epochs", "1"]
    if folders:
        options += ["--encoder_states_folder", str(tmp_path / "states"), "--teacher_cache", str(tmp_path / "cache")]
    done = torchrun(["recipes/distil_whisper/train.py"], tmp_path, tmp_path / "x.yaml", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load_file(f"{teacher}/model.safetensors"), weights(tmp_path)
    assert any(not torch.equal(before[name], value) for name, value in after.items() if "decoder.layers.0" in name)
    for folder in ("states", "cache") if folders else ():
        assert len([*(tmp_path / folder).glob("??/*.safetensors")]) == 4


def test_a_student_trains_in_bfloat16(corpus: Path, tmp_path: Path, teacher: str) -> None:
    only = ("--train_only", "True", "--number_of_epochs", "1", "--precision", "bf16")
    assert train(corpus, tmp_path / "a", teacher, *only) == 0
    before, after = load_file(f"{teacher}/model.safetensors"), weights(tmp_path / "a")
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items() if "decoder.layers.0" in name)
