from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import chirp

from efficient_asr import data
from efficient_asr.data import checking
from efficient_asr.data.augmentation import Augment
from efficient_asr.text.normalise import normalise_plain
from efficient_asr.utils.errors import UserError


def write_lines(path: Path, lines: list) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_manifest_round_trip(corpus: Path) -> None:
    rows = data.read_manifest(corpus / "train.jsonl")
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    again = data.read_manifest(data.write_manifest(corpus / "again.jsonl", rows))
    assert list(again) == list(rows)


def test_every_bad_line_is_reported_with_its_number(corpus: Path) -> None:
    (corpus / "noise.wav").write_bytes(b"this is not audio")
    soundfile.write(corpus / "empty.wav", np.zeros(0), 16000)
    good = {"id": "g", "audio": "u0.wav", "duration": 1.0, "text": "one"}
    lines = [
        good,
        b"{broken",
        b"[1, 2]",
        {**good, "id": "h", "audio": "missing.wav"},
        {**good, "id": "i", "audio": "noise.wav"},
        {**good, "id": "j", "text": "  "},
        {**good, "id": "k", "text": None},
        good,
        {"id": "l", "text": "no audio"},
        {**good, "id": "m", "duration": -1},
        {**good, "id": "n", "audio": "empty.wav"},
        {**good, "id": "o", "duration": 1000.0},
        {**good, "id": "p", "language": 3},
        b"\xff\xfe{}",
    ]
    path = write_lines(corpus / "bad.jsonl", lines)
    with pytest.raises(UserError) as caught:
        data.read_manifest(path, skip_bad=False)
    message = str(caught.value)
    expected = {
        2: "not JSON", 3: "not a JSON object", 4: "no such file", 5: "cannot decode", 6: "empty text", 7: "no text",
        8: "already used in line 1", 9: "no audio",
        10: "not a positive number", 11: "no samples", 12: "holds 1.000 s", 13: "is not a string", 14: "not UTF-8",
    }  # fmt: skip
    for number, words in expected.items():
        line = next(x for x in message.splitlines() if x.strip().startswith(f"line {number}:"))
        assert words in line
    assert message.startswith("13 bad lines") and message.endswith("Fix them, or skip them with --skip_bad True.")
    with pytest.raises(UserError, match=r"Fix them\.$"):  # of a command that cannot skip them
        data.read_manifest(path)
    skipped = corpus / "skipped.jsonl"
    rows = data.read_manifest(path, skip_bad=True, skipped_file=skipped)
    assert [row["id"] for row in rows] == ["g"]
    assert [json.loads(x)["line"] for x in skipped.read_text().splitlines()] == sorted(expected)


def test_a_duration_that_was_rounded_down_is_that_of_the_audio(tmp_path: Path) -> None:
    """Checks of the window would pass, and the training would end in the middle of an epoch."""
    soundfile.write(tmp_path / "a.wav", chirp(1.04, 200, 400), 16000)
    rows = [{"id": str(s), "audio": "a.wav", "duration": s, "text": "a"} for s in (1.0, 1.04, 1.035, 1.06)]
    path = write_lines(tmp_path / "test.jsonl", rows)
    for check in ("header", "samples"):
        assert data.read_manifest(path, check_audio=check).durations.tolist() == [1.04, 1.04, 1.035, 1.06]


def test_columns_are_mapped_and_extra_fields_kept(corpus: Path) -> None:
    lines = [{"path": "u0.wav", "sentence": "one", "mood": "glad"}, {"path": "u1.wav", "machine": "two"}]
    path = write_lines(corpus / "own.jsonl", lines)
    rows = data.read_manifest(path, {"audio": "path", "text": ["sentence", "machine"]})
    assert [row["text"] for row in rows] == ["one", "two"]
    assert rows[0]["mood"] == "glad"
    assert rows[0]["id"] == "u0.wav"
    assert rows[0]["duration"] == pytest.approx(1.0)


def test_unknown_column_and_missing_manifest(corpus: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'audio'"):
        data.read_manifest(corpus / "train.jsonl", {"audoi": "path"})
    with pytest.raises(UserError, match="no manifest at"):
        data.read_manifest(corpus / "none.jsonl")


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (44100, 1), (48000, 6)])
def test_any_rate_and_channel_count(tmp_path: Path, rate: int, channels: int) -> None:
    mono = chirp(0.5, 200, 900, rate)
    soundfile.write(tmp_path / "a.flac", np.repeat(mono[:, None], channels, axis=1), rate)
    wav = data.load_audio(tmp_path / "a.flac")
    assert wav.dim() == 1
    assert len(wav) == pytest.approx(8000, abs=1)
    reference = torch.from_numpy(chirp(0.5, 200, 900))
    inner = slice(400, 7600)
    assert torch.corrcoef(torch.stack([wav[inner], reference[inner]]))[0, 1] > 0.99


def test_padding_and_relative_lengths(wavs: list[torch.Tensor]) -> None:
    batch, wav_lens = data.pad_wavs(wavs)
    assert data.absolute_lengths(batch, wav_lens).tolist() == [len(wav) for wav in wavs]
    noisy = batch + 1.0
    clean = data.zero_padding(noisy, data.absolute_lengths(batch, wav_lens))
    assert (clean[2, len(wavs[2]) :] == 0).all()
    assert torch.equal(clean[1], noisy[1])


@pytest.mark.parametrize("sorting", ["ascending", "descending"])
def test_sorting(sorting: str) -> None:
    durations = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    order = [i for batch in data.BatchOrder(durations, sorting, 2) for i in batch]
    assert durations[order].tolist() == sorted(durations, reverse=sorting == "descending")


def test_unknown_sorting() -> None:
    with pytest.raises(UserError, match="use ascending, descending or random"):
        data.BatchOrder(np.ones(3), "up", 2)


LENGTHS = {  # utterances of about the lengths of LibriSpeech, of Common Voice, of commands, and of two kinds mixed
    "librispeech": lambda rng, n: np.concatenate(
        [rng.normal(14.2, 1.5, n * 6 // 10), rng.uniform(1.5, 14, n * 4 // 10)]
    ),
    "short": lambda rng, n: np.clip(rng.gamma(2, 1.0, n), 0.3, 20),
    "uniform": lambda rng, n: rng.uniform(1, 15, n),
    "two kinds": lambda rng, n: np.concatenate([rng.normal(3, 0.2, n // 2), rng.normal(25, 1, n // 2)]),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("limit", [60.0, 200.0])
def test_batches_by_length_hold_every_utterance_once_within_the_limit_and_waste_little(kind: str, limit: float) -> None:
    durations = LENGTHS[kind](np.random.default_rng(0), 2000)
    order = data.BatchOrder(durations, "random", 64, limit, seed=1)
    batches = list(order)
    assert sorted(i for batch in batches for i in batch) == list(range(2000))
    assert max(len(batch) for batch in batches) <= 64
    assert max(len(batch) * durations[batch].max() for batch in batches) <= limit
    padded = sum(len(batch) * durations[batch].max() for batch in batches)
    waste_percent = 100 * (1 - durations.sum() / padded)
    assert order.padding_percent() == pytest.approx(waste_percent)
    assert waste_percent < 10


def test_files_that_lack_a_language_give_no_empty_batch() -> None:
    durations, shards = np.full(12, 2.0), np.arange(12)
    groups = np.array([0] * 8 + [1] * 4)  # some of the files that are drawn together have one language only
    order = data.BatchOrder(durations, "random", 2, 6.0, 5, groups=groups, shards=shards)
    for epoch in range(1, 9):
        order.set_epoch(epoch)
        batches = list(order)
        assert min(map(len, batches)) > 0 and sorted(int(i) for batch in batches for i in batch) == list(range(12))
        assert 0 <= order.padding_percent() < 100


def test_an_utterance_longer_than_the_limit_stands_alone() -> None:
    batches = list(data.BatchOrder(np.array([1.0, 2.0, 90.0]), "ascending", 8, 10.0))
    assert batches == [[0, 1], [2]]


@pytest.mark.parametrize("limit", [None, 20.0])
def test_batches_follow_from_seed_and_epoch_alone(limit: float | None) -> None:
    durations = np.random.default_rng(0).uniform(1, 8, 60)
    order, same = (data.BatchOrder(durations, "random", 4, limit, seed=1) for _ in range(2))
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert first != second and sorted(i for b in first for i in b) == sorted(i for b in second for i in b)
    same.set_epoch(1)
    same.skip = 3  # what a training does that goes on in the middle of an epoch
    assert list(same) == second[3:] and list(same) == second and len(same) == len(second)


@pytest.mark.parametrize("sorting", ["random", "ascending"])
def test_processes_share_the_batches(sorting: str) -> None:
    durations = np.random.default_rng(0).uniform(1, 8, 50)
    orders = [data.BatchOrder(durations, sorting, 4, None, 1, rank, 3) for rank in range(3)]
    assert {len(order) for order in orders} == {5}  # 13 batches and two repeated
    assert {i for order in orders for batch in order for i in batch} == set(range(50))
    orders = [data.BatchOrder(durations, sorting, 4, None, 1, rank, 3, repeat=False) for rank in range(3)]
    assert sorted(i for order in orders for batch in order for i in batch) == list(range(50))


def test_speed_perturbation_is_applied(wavs: list[torch.Tensor]) -> None:
    batch, wav_lens = data.pad_wavs(wavs)
    torch.manual_seed(0)
    augment = Augment([95, 100, 105])
    lengths = {augment(batch, wav_lens)[0].shape[1] for _ in range(20)}
    expected = [batch.shape[1] / speed for speed in (0.95, 1.0, 1.05)]
    assert len(lengths) == 3
    for length in lengths:
        assert min(abs(length - e) for e in expected) <= 1
    assert augment.fastest == 1.05


def test_noise_has_the_wanted_ratio_and_stays_out_of_the_padding(corpus: Path, wavs: list[torch.Tensor]) -> None:
    batch, wav_lens = data.pad_wavs(wavs)
    batch = batch / batch.abs().max() * 0.2
    torch.manual_seed(0)
    augment = Augment(None, noise_manifest=str(corpus / "test.jsonl"), snr_low_db=10, snr_high_db=10, probability=1.0)
    noisy, _ = augment(batch, wav_lens)
    lengths = data.absolute_lengths(batch, wav_lens)
    assert (noisy[2, lengths[2] :] == 0).all()
    gain = 1 - 1 / (10 ** (10 / 20) + 1)  # SpeechBrain scales the speech down as it adds noise
    noise = noisy[1] - gain * batch[1]
    measured = 20 * torch.log10(gain * batch[1].pow(2).mean().sqrt() / noise.pow(2).mean().sqrt())
    assert float(measured) == pytest.approx(10, abs=1.0)


def test_reverberation_changes_speech_and_repeats_with_the_seed(corpus: Path, wavs: list[torch.Tensor]) -> None:
    batch, wav_lens = data.pad_wavs(wavs)
    augment = Augment(None, rir_manifest=str(corpus / "test.jsonl"), probability=1.0)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(augment(batch, wav_lens)[0])
    assert torch.equal(*outs)
    assert not torch.allclose(outs[0], batch, atol=1e-3)


def test_augmentation_off_is_the_identity(wavs: list[torch.Tensor]) -> None:
    batch, wav_lens = data.pad_wavs(wavs)
    assert torch.equal(Augment([100])(batch, wav_lens)[0], batch)


def test_texts_empty_after_normalisation_are_left_out(capsys: pytest.CaptureFixture) -> None:
    rows = data.Rows.of([{"id": "a", "text": "Yes.", "duration": 1.0}, {"id": "b", "text": "?!", "duration": 1.0}])
    with pytest.raises(UserError, match=r"b: text '.*' is empty after normalisation"):
        data.normalise_texts(rows, normalise_plain)
    assert [row["text"] for row in data.normalise_texts(rows, normalise_plain, skip_bad=True)] == ["yes"]
    assert "1 bad utterance left out" in capsys.readouterr().out


def test_checking_goes_on_where_it_stopped_and_forgets_problems(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "CHUNK", 1)
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    paths = [str(corpus / row["audio"]) for row in rows]
    looked_at: list[str] = []
    original = checking.inspect_audio

    def inspect(path: str, samples: bool) -> checking.AudioReport:
        looked_at.append(path)
        if len(looked_at) == 3:
            raise KeyboardInterrupt
        if len(looked_at) == 4:
            return checking.AudioReport(0.0, "the disk did not answer")
        return original(path, samples)

    monkeypatch.setattr(checking, "inspect_audio", inspect)

    def check() -> checking.Found:
        durations = array("d", [float("nan")] * len(paths))
        return checking.check_files(lambda i: {"audio": paths[i]}, durations, True, tmp_path / "cache", "x")

    with pytest.raises(KeyboardInterrupt):
        check()
    found = check()
    assert looked_at == [*paths[:3], *paths[2:]] and found.problems == {2: "the disk did not answer"}
    found = check()
    assert looked_at[5:] == [paths[2]] and not found.problems
    assert list(found.durations) == pytest.approx([1.0, 1.31, 0.7, 1.137], abs=0.01)
    check()
    assert len(looked_at) == 6
