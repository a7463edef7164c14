"""Distillation against closed forms in float64, and what is kept of a teacher on the disk."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import multilingual_whisper

from efficient_asr.data import Rows, load_audio, pad_wavs, write_manifest
from efficient_asr.techniques.distillation.brain import LOSS, DistillingBrain
from efficient_asr.techniques.distillation.losses import (
    DistillationLoss,
    TeacherDistribution,
    js_divergence,
    kl_divergence,
    with_rest,
)
from efficient_asr.techniques.distillation.teacher import Teacher, TeacherCache
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils.errors import UserError


def distributions(seed: int, shape: tuple[int, ...] = (3, 5, 11)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape))


def test_kl_is_its_closed_form() -> None:
    t, s = distributions(0).log_softmax(-1), distributions(1).log_softmax(-1)
    p, q = t.numpy(), s.numpy()
    np.testing.assert_allclose(kl_divergence(t, s).numpy(), (np.exp(p) * (p - q)).sum(-1), rtol=1e-12)
    assert kl_divergence(t, t).abs().max() == 0.0
    assert (kl_divergence(t, s) > 0).all()


def test_js_is_its_closed_form_symmetric_and_bounded() -> None:
    t, s = distributions(0).log_softmax(-1), distributions(1).log_softmax(-1)
    p, q = np.exp(t.numpy()), np.exp(s.numpy())
    m = (p + q) / 2
    expected = 0.5 * (p * np.log(p / m)).sum(-1) + 0.5 * (q * np.log(q / m)).sum(-1)
    np.testing.assert_allclose(js_divergence(t, s).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(js_divergence(t, s).numpy(), js_divergence(s, t).numpy(), rtol=1e-12)
    assert js_divergence(t, t).abs().max() < 1e-15
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    assert js_divergence(apart[0], apart[1]).item() == pytest.approx(math.log(2), abs=1e-12)
    assert (js_divergence(t, s) <= math.log(2)).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["kl", "js"])
def test_divergence_takes_temperature_and_leaves_padding_out(kind: str, temperature: float) -> None:
    teacher, student = distributions(0), distributions(1)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    loss = DistillationLoss(kind, temperature)
    t, s = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    expected = temperature**2 * {"kl": kl_divergence, "js": js_divergence}[kind](t, s)[real].mean()
    found = loss.divergence(TeacherDistribution(t), student, real)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    student[~real] = 1000.0 * torch.randn(int((~real).sum()), 11, dtype=torch.float64)
    assert loss.divergence(TeacherDistribution(t), student, real).item() == found.item()


def test_weights_of_the_sum() -> None:
    supervised, divergence = torch.tensor(3.0), torch.tensor(0.5)
    fixed = DistillationLoss(sigma=[1.41, 2.0])
    assert fixed(supervised, divergence).item() == pytest.approx(0.5 * (3 / 1.41**2 + 0.5 / 4), rel=1e-6)
    learned = DistillationLoss(sigma=[1.41, 2.0], learn_sigma=True)
    value = learned(supervised, divergence)
    assert value.item() == pytest.approx(0.5 * (3 / 1.41**2 + 0.5 / 4) + math.log(1.41 * 2), rel=1e-6)
    value.backward()
    # d/d log sigma of x / (2 sigma^2) + log sigma
    np.testing.assert_allclose(learned.log_sigma.grad.numpy(), [1 - 3 / 1.41**2, 1 - 0.5 / 4], rtol=1e-5)
    # a checkpoint holds learned weights; those of the YAML file may have been changed since it was written
    changed, again = DistillationLoss(sigma=[2.0, 3.0]), DistillationLoss(sigma=[9.0, 9.0], learn_sigma=True)
    changed.load_state_dict(fixed.state_dict())
    again.load_state_dict(learned.state_dict())
    np.testing.assert_allclose(changed.log_sigma.numpy(), np.log([2.0, 3.0]), rtol=1e-6)
    assert torch.equal(again.log_sigma, learned.log_sigma)
    warm = DistillationLoss(sigma=[1.0, 1.0], warm_up=0.5)
    assert warm(supervised, divergence, 0.0).item() == pytest.approx(1.5)
    assert warm(supervised, divergence, 0.25).item() == pytest.approx(0.5 * (3 + 0.25))
    assert warm(supervised, divergence, 0.9).item() == pytest.approx(0.5 * (3 + 0.5))


def test_few_entries_and_the_rest_bound_the_divergence_from_below() -> None:
    t, s = distributions(2).log_softmax(-1), distributions(3).log_softmax(-1)
    full, values = kl_divergence(t, s), []
    for k in (1, 3, 10, 11):
        indices = t.topk(k, dim=-1).indices
        classes = with_rest(t, indices)
        assert torch.allclose(classes.exp().sum(-1), torch.ones(3, 5, dtype=torch.float64))
        values.append(kl_divergence(classes, with_rest(s, indices)))
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all()
    assert (values[0] < full - 1e-3).any()
    torch.testing.assert_close(values[2], full)  # ten of eleven, and the rest is the eleventh
    torch.testing.assert_close(values[3], full)


def test_gradients_stay_finite_where_a_student_is_sure() -> None:
    logits = torch.zeros(1, 1, 8)
    logits[..., 0] = 200.0
    logits.requires_grad_(True)
    teacher = torch.zeros(1, 1, 8).log_softmax(-1)
    indices = torch.tensor([[[0, 1]]])
    for kind in ("kl", "js"):
        for distribution in (TeacherDistribution(teacher), TeacherDistribution(with_rest(teacher, indices), indices)):
            DistillationLoss(kind).divergence(distribution, logits, torch.ones(1, 1, dtype=torch.bool)).backward()
            assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "jss"}, "js"),
        ({"temperature": 0.0}, "temperature"),
        ({"sigma": [1.0]}, "sigma"),
        ({"warm_up": 2}, "kd_warm_up"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillationLoss(**settings)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:

    made = []
    for i, (text, language) in enumerate(
        [("hello there", "en"), ("guten tag zusammen", "de"), ("one two three", "en")]
    ):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 8000 + 1600 * i), 16000)
        made.append(
            {
                "id": f"u{i}",
                "audio": str(tmp_path / f"{i}.wav"),
                "duration": 0.5 + 0.1 * i,
                "text": text,
                "language": language,
            }
        )
    write_manifest(tmp_path / "rows.jsonl", iter(made))
    return Rows.of(made)


def test_cache_says_what_the_teacher_said(tmp_path: Path, rows: Rows) -> None:
    teacher_folder, student = tmp_path / "teacher", multilingual_whisper(seed=1)
    multilingual_whisper(seed=2).save(teacher_folder)
    teacher = Teacher(str(teacher_folder), student)
    entries = len(student.tokenizer)
    cache = TeacherCache(tmp_path / "kept", {"teacher": "t", "temperature": 1.0, "entries": entries})
    assert cache.fill(teacher, student, rows) == 3
    assert cache.fill(teacher, student, rows) == 0
    tokens = [student.labels.encode_row(row) for row in rows]
    path = cache.store.path(f"u1\0{tokens[1]}")
    path.unlink()  # as after an interruption
    assert TeacherCache(cache.folder, cache.about).fill(teacher, student, rows) == 1
    lengths = torch.tensor([len(t) for t in tokens])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in tokens], batch_first=True)
    kept = cache.read([row["id"] for row in rows], padded, lengths)
    wavs, wav_lens = pad_wavs([load_audio(row["audio"]) for row in rows])
    live = teacher(wavs, (wav_lens * wavs.shape[1]).round().long(), padded[:, :-1], 1.0)
    logits = student(wavs, (wav_lens * wavs.shape[1]).round().long(), padded[:, :-1])
    real = torch.arange(padded.shape[1] - 1) < (lengths - 1)[:, None]
    for kind in ("kl", "js"):
        loss = DistillationLoss(kind)
        one, other = (loss.divergence(d, logits, real).item() for d in (kept, live))
        assert one == pytest.approx(other, rel=2e-3)  # kept in half precision
    with pytest.raises(UserError, match="temperature"):
        TeacherCache(cache.folder, cache.about | {"temperature": 2.0})
    soundfile.write(rows[2]["audio"], np.random.default_rng(9).normal(0, 0.1, 11200), 16000)  # another recording
    assert cache.fill(teacher, student, rows) == 1
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="u1"):
        cache.read(["u1"], padded[1:2], lengths[1:2])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_teacher_and_its_cache_divide_logits_by_the_temperature(
    temperature: float, tmp_path: Path, rows: Rows
) -> None:
    whisper, student = multilingual_whisper(seed=2), multilingual_whisper(seed=1)
    whisper.save(tmp_path / "teacher")
    teacher, tokens = Teacher(str(tmp_path / "teacher"), student), torch.tensor([student.labels.encode_row(rows[0])])
    wavs, lengths = load_audio(rows[0]["audio"])[None], torch.tensor([8000])
    with torch.no_grad():
        expected = (whisper.eval()(wavs, lengths, tokens[:, :-1]) / temperature).log_softmax(dim=-1)
    torch.testing.assert_close(teacher(wavs, lengths, tokens[:, :-1], temperature).log_probs, expected)
    entries = len(student.tokenizer)
    cache = TeacherCache(tmp_path / "kept", {"teacher": "t", "temperature": temperature, "entries": entries})
    cache.fill(teacher, student, rows[:1])
    kept = cache.read([rows[0]["id"]], tokens, torch.tensor([tokens.shape[1]]))
    found = torch.zeros_like(expected).scatter_(-1, kept.indices, kept.log_probs[..., :entries])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # half precision


def test_the_training_asks_at_the_temperature_and_weighs_by_progress(rows: Rows) -> None:
    asked, weighed = [], []

    class Loss:
        temperature = 2.5

        def __call__(self, supervised: torch.Tensor, divergence: torch.Tensor, progress: float) -> torch.Tensor:
            weighed.append((float(supervised), float(divergence), progress))
            return supervised + divergence

        def divergence(self, teacher: Any, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            return torch.tensor(7.0)

    model = SimpleNamespace(training_modules={LOSS: Loss()})
    brain = object.__new__(type("Bare", (DistillingBrain,), {"model": model, "progress": 0.25}))
    brain.teacher = lambda wavs, lengths, tokens, temperature: asked.append((tokens.tolist(), temperature))
    brain.heard = (torch.zeros(1, 10), torch.tensor([10]))
    brain.predicted = lambda batch: None
    batch = SimpleNamespace(tokens=(torch.tensor([[5, 6, 7]]), torch.ones(1)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WhisperBrain, "compute_objectives", lambda *_: torch.tensor(3.0))
        assert float(brain.compute_objectives(torch.zeros(1), batch, sb.Stage.TRAIN)) == 10.0
        assert float(brain.compute_objectives(torch.zeros(1), batch, sb.Stage.VALID)) == 3.0
    assert asked == [([[5, 6]], 2.5)] and weighed == [(3.0, 7.0, 0.25)]


def test_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    multilingual_whisper(seed=2, texts=["entirely other words", "zzz yyy xxx"]).save(tmp_path / "teacher")
    with pytest.raises(UserError, match="vocabulary"):
        Teacher(str(tmp_path / "teacher"), multilingual_whisper(seed=1))


def test_teacher_in_lower_precision_says_nearly_the_same(tmp_path: Path) -> None:
    multilingual_whisper(seed=2).save(tmp_path / "teacher")
    student, wavs = multilingual_whisper(seed=1), torch.randn(1, 16000) * 0.1
    tokens, lengths = torch.randint(0, 200, (1, 6)), torch.tensor([16000])
    full, low = (
        Teacher(str(tmp_path / "teacher"), student, a)(wavs, lengths, tokens, 1.0).log_probs
        for a in ("float32", "bfloat16")
    )
    assert low.dtype == torch.float32 and not torch.equal(full, low)
    assert kl_divergence(full, low).max() < 0.01
    with pytest.raises(UserError, match="teacher_dtype"):
        Teacher(str(tmp_path / "teacher"), student, "int8")
