"""Audio from files, file objects and arrays; times for models that predict none; calls; formats."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import chirp, make_wavs

from efficient_asr.data import from_samples, load_audio, load_channels
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.formats import format_record, format_records, rounded
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.recordings import find_audio, transcribe_parties, transcribe_timed
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel
from efficient_asr.utils.errors import UserError


@pytest.fixture
def transcriber(tiny_ctc: CTCModel) -> CTCTranscriber:
    torch.nn.init.normal_(tiny_ctc.head.linear.weight, std=2.0)
    return CTCTranscriber(tiny_ctc)


def test_every_kind_of_source_gives_the_same_transcript(transcriber: CTCTranscriber, tmp_path: Path) -> None:
    wav = chirp(1.3, 100, 900)
    soundfile.write(tmp_path / "a.wav", wav, 16000, subtype="FLOAT")
    content = (tmp_path / "a.wav").read_bytes()
    with open(tmp_path / "a.wav", "rb") as file:
        sources = [
            tmp_path / "a.wav", str(tmp_path / "a.wav"), io.BytesIO(content), file, wav, torch.from_numpy(wav),
            (np.stack([wav, wav], axis=1), 16000), (torch.from_numpy(np.stack([wav, wav])), 16000),
        ]  # fmt: skip
        found = transcriber.transcribe_files(sources, sample_rate=16000, batch_size=3)
    assert len(found) == 8 and len({t.text for t in found}) == 1 and found[0].text
    assert transcriber.transcribe_files(str(tmp_path / "a.wav"))[0].text == found[0].text
    for waveform in (
        wav,
        torch.from_numpy(wav),
        wav[None],
        torch.from_numpy(wav)[None],
    ):  # 1-D and NumPy, without lengths
        assert transcriber.transcribe(waveform)[0].text == found[0].text


def test_sources_that_cannot_be_read_are_explained(transcriber: CTCTranscriber, tmp_path: Path) -> None:
    wav = chirp(1.0, 100, 900)
    (tmp_path / "x.wav").write_text("no audio")
    for sources, message in (
        ([wav], "give the sample rate of arrays"),
        ([7], "cannot transcribe a int"),
        ([(wav, 10)], "sample rate of 10 Hz"),
        ([(np.zeros((2, 2, 2)), 16000)], "samples must be"),
        ([(wav, "16000")], "the sample rate must be a whole number, not '16000'"),
        ([(wav, 16000.5)], "the sample rate must be a whole number, not 16000.5"),
        ([(wav, float("nan"))], "the sample rate must be a whole number, not nan"),
        ([io.BytesIO(b"no audio")], "cannot decode the file object"),
        ([tmp_path / "x.wav"], "x.wav"),
    ):
        with pytest.raises(UserError, match=message):
            transcriber.transcribe_files(sources)
    with pytest.raises(UserError, match="if they are lengths in samples, divide them by 16000"):
        transcriber.transcribe(wav[None], torch.tensor([16000.0]))


def test_channels_are_averaged_or_kept(tmp_path: Path) -> None:
    left, right = chirp(1.0, 100, 500, 8000), chirp(1.0, 900, 1500, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000, subtype="FLOAT")
    channels = load_channels(tmp_path / "a.wav")
    assert channels.shape == (2, 16000)
    assert torch.allclose(channels.mean(dim=0), load_audio(tmp_path / "a.wav"), atol=1e-6)
    assert torch.allclose(channels[1], from_samples(right, 8000), atol=1e-6)
    assert torch.equal(from_samples(right, np.int64(8000)), from_samples(right, 8000))
    assert torch.equal(from_samples(right[::-1], 8000.0), from_samples(right[::-1].copy(), 8000))
    assert torch.equal(from_samples(right.astype(">f4"), 8000), from_samples(right.astype("<f4"), 8000))
    soundfile.write(tmp_path / "mono.wav", left, 8000, subtype="FLOAT")
    assert torch.equal(load_channels(tmp_path / "mono.wav")[0], load_audio(tmp_path / "mono.wav"))


def pauses() -> torch.Tensor:
    """Two pieces of sound, at 0.5 and at 4 s."""
    wav = 0.0005 * torch.randn(6 * 16000, generator=torch.Generator().manual_seed(0))
    wav[8000 : 8000 + 16000] += torch.from_numpy(chirp(1.0, 100, 900))
    wav[64000 : 64000 + 20800] += torch.from_numpy(chirp(1.3, 200, 2000))
    return wav


def test_a_model_without_timestamps_gets_the_times_of_its_pauses(transcriber: CTCTranscriber) -> None:
    transcript = transcribe_timed(transcriber, pauses())
    first, second = transcript.details["segments"]
    assert 0.2 <= first["start_s"] <= 0.6 and 1.4 <= first["end_s"] <= 1.9
    assert 3.7 <= second["start_s"] <= 4.1 and 5.2 <= second["end_s"] <= 5.7
    assert transcript.text == f"{first['text']} {second['text']}"


def test_a_whisper_predicts_its_times(tiny_whispers: dict[str, str]) -> None:
    transcriber = load_transcriber(tiny_whispers["large"], language="en")
    assert transcriber.with_times() is None or "segments" in transcribe_timed(transcriber, make_wavs()[0]).details
    assert transcribe_timed(transcriber, make_wavs()[0]).details["segments"] is not None
    if (timed := transcriber.with_times()) is not None:  # times that were predicted behind the end
        late = {"segments": [{"start_s": 0.1, "end_s": 9.0, "text": "a"}, {"start_s": 9.0, "end_s": 9.5, "text": "b"}]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(timed), "transcribe", lambda self, wav: [Transcript("a b", late)])
            found = transcribe_timed(transcriber, torch.zeros(16000)).details["segments"]
        assert [(each["start_s"], each["end_s"]) for each in found] == [(0.1, 1.0), (1.0, 1.0)]


def test_the_parties_of_a_call_are_named_and_in_order(transcriber: CTCTranscriber) -> None:
    quiet = 0.0005 * torch.randn(6 * 16000, generator=torch.Generator().manual_seed(1))
    quiet[32000:48000] += torch.from_numpy(chirp(1.0, 300, 700))
    call = transcribe_parties(transcriber, torch.stack([pauses(), quiet]), ["agent"])
    assert [turn["speaker"] for turn in call.details["segments"]] == ["agent", "channel 1", "agent"]
    starts = [turn["start_s"] for turn in call.details["segments"]]
    assert starts == sorted(starts)
    assert call.text == " ".join(turn["text"] for turn in call.details["segments"])


RECORD = {
    "audio": "a.wav", "text": "one & two {x}", "tokens": 3,
    "segments": [
        {"start_s": 0.5, "end_s": 1.25, "text": "one &", "speaker": "agent"},
        {"start_s": 3601.0, "end_s": 3602.5, "text": "two {x}", "speaker": "customer"},
    ],
}  # fmt: skip


def test_formats() -> None:
    srt, vtt = format_record(RECORD, "srt"), format_record(RECORD, "vtt")
    assert "1\n00:00:00,500 --> 00:00:01,250\nagent: one &\n" in srt and "01:00:01,000 --> 01:00:02,500\n" in srt
    assert "customer: two {x}" in srt and vtt.startswith("WEBVTT") and "00:00:00.500 --> 00:00:01.250" in vtt
    assert "agent: one &amp;" in vtt
    assert format_record(RECORD, "txt") == "agent: one &\ncustomer: two {x}\n"
    assert format_record({"text": "hi", "segments": [{"text": "hi"}]}, "txt") == "hi\n"
    assert format_records([RECORD], "csv") == "audio,text,tokens\na.wav,one & two {x},3\n"
    assert format_records([RECORD], "csv", by_segment=True).splitlines()[1:] == [
        "a.wav,0.5,1.25,one &,agent", "a.wav,3601.0,3602.5,two {x},customer",
    ]  # fmt: skip
    assert json.loads(format_records([RECORD, RECORD], "json")) == [RECORD, RECORD]
    assert [json.loads(line) for line in format_records([RECORD] * 2, "jsonl").splitlines()] == [RECORD] * 2
    assert rounded({"a": [0.123456, 2], "b": "x"}) == {"a": [0.1235, 2], "b": "x"}


def test_find_audio(tmp_path: Path) -> None:
    for name in ("b/one.WAV", "b/two.flac", "b/notes.txt", "c/three.mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(relative) for _, relative in find_audio([tmp_path])] == ["b/one.WAV", "b/two.flac", "c/three.mp3"]
    assert [path.name for path, _ in find_audio([f"{tmp_path}/*/t*.*"])] == ["two.flac", "three.mp3"]
    assert len(find_audio([tmp_path, tmp_path / "b" / "one.WAV"])) == 3
    assert find_audio([tmp_path / "missing.wav"])[0][0] == tmp_path / "missing.wav"  # reported when it is read
    (tmp_path / "a_latest").symlink_to(tmp_path / "b")  # the files stand under the folder's own name
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "d").symlink_to(tmp_path.parent / "outside", target_is_directory=True)
    (tmp_path.parent / "outside").mkdir(exist_ok=True)
    (tmp_path.parent / "outside" / "four.wav").touch()
    expected = ["b/one.WAV", "b/two.flac", "c/three.mp3", "d/four.wav"]
    assert [str(relative) for _, relative in find_audio([tmp_path])] == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no audio files"):
        find_audio([tmp_path / "empty"])
    with pytest.raises(UserError, match="no file matches"):
        find_audio([f"{tmp_path}/*.ogg"])
