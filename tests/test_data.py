from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import chirp

from efficient_asr import data
from efficient_asr.augmentation import Augment
from efficient_asr.errors import UserError
from efficient_asr.text import CharacterLabels, normalise_plain


def write_lines(path: Path, lines: list) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_manifest_round_trip(corpus: Path) -> None:
    rows = data.read_manifest(corpus / "train.jsonl")
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    again = data.read_manifest(data.write_manifest(corpus / "again.jsonl", rows))
    assert again == rows


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
        data.read_manifest(path)
    message = str(caught.value)
    expected = {
        2: "not JSON", 3: "not a JSON object", 4: "no such file", 5: "cannot decode", 6: "empty text", 7: "no text",
        8: "already used in line 1", 9: "no audio",
        10: "not a positive number", 11: "no samples", 12: "holds 1.000 s", 13: "is not a text", 14: "not UTF-8",
    }  # fmt: skip
    for number, words in expected.items():
        line = next(x for x in message.splitlines() if x.strip().startswith(f"line {number}:"))
        assert words in line
    assert message.startswith("13 bad lines") and "--skip_bad True" in message
    skipped = corpus / "skipped.jsonl"
    rows = data.read_manifest(path, skip_bad=True, skipped_file=skipped)
    assert [row["id"] for row in rows] == ["g"]
    assert [json.loads(x)["line"] for x in skipped.read_text().splitlines()] == sorted(expected)


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
def test_sorting(corpus: Path, sorting: str) -> None:
    rows = data.read_manifest(corpus / "train.jsonl")
    dataset = data.make_dataset(rows, CharacterLabels.from_texts(["abc"]), sorting)
    lengths = [len(dataset[i]["wav"]) for i in range(4)]
    assert lengths == sorted(lengths, reverse=sorting == "descending")


def test_unknown_sorting(corpus: Path) -> None:
    with pytest.raises(UserError, match="not ascending, descending or random"):
        data.make_dataset(data.read_manifest(corpus / "train.jsonl"), CharacterLabels([]), "up")


def test_dynamic_batches_hold_every_utterance_once_and_stay_below_the_limit(corpus: Path) -> None:
    template = data.read_manifest(corpus / "train.jsonl")[0]
    rng = np.random.default_rng(0)
    rows = [{**template, "id": str(i), "duration": float(d)} for i, d in enumerate(rng.uniform(1, 15, 300))]
    dataset = data.make_dataset(rows, CharacterLabels([]), "random")
    options = data.loader_options(dataset, "random", 16, 60.0, 0, seed=1)
    batches = list(options["batch_sampler"])
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    durations = [[rows[i]["duration"] for i in batch] for batch in batches]
    assert max(len(batch) for batch in batches) <= 16
    padded = sum(max(batch) * len(batch) for batch in durations)
    assert sum(map(sum, durations)) / padded > 0.9  # under 10 % of the frames are padding


def test_dynamic_batches_differ_between_epochs(corpus: Path) -> None:
    template = data.read_manifest(corpus / "train.jsonl")[0]
    rows = [{**template, "id": str(i), "duration": 1.0 + i % 7} for i in range(60)]
    dataset = data.make_dataset(rows, CharacterLabels([]), "random")
    sampler = data.loader_options(dataset, "random", 4, 60.0, 0, seed=1)["batch_sampler"]
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


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
    rows = [{"id": "a", "text": "Yes."}, {"id": "b", "text": "?!"}]
    with pytest.raises(UserError, match=r"b: nothing is left of the text"):
        data.normalise_texts(rows, normalise_plain)
    assert [row["text"] for row in data.normalise_texts(rows, normalise_plain, skip_bad=True)] == ["yes"]
    assert "1 bad utterance left out" in capsys.readouterr().out
