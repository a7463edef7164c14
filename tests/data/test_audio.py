"""Audio files of all kinds: read to their true end, and what is checked is what the model gets."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import chirp

from efficient_asr import data
from efficient_asr.data.audio import inspect_audio, load_audio
from efficient_asr.utils.errors import UserError

RATE = 16000
ENCODED = {
    "mp3": ("mp3", "mp3"), "m4a": ("ipod", "aac"), "mp4": ("mp4", "aac"), "webm": ("webm", "libopus"), "aac": ("adts", "aac"),
    "opus": ("ogg", "libopus"), "flac": ("flac", "flac"), "wv": ("wv", "wavpack"),
}  # fmt: skip


def encode(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    """Write [time] in the format of the file's ending."""
    container_format, codec = ENCODED[path.suffix[1:]]
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=48000 if codec == "libopus" else rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=stream.rate)
        fifo = av.AudioFifo()
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            fifo.write(part)
        size = stream.codec_context.frame_size or 1024
        while (part := fifo.read(size, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def without_xing(path: Path) -> Path:
    """Take the first frame of an MP3, which holds the number of frames, out of it."""
    content = path.read_bytes()
    start = (
        10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(content[6:10])) if content[:3] == b"ID3" else 0
    )
    second = content.index(content[start : start + 2], start + 4)
    path.write_bytes(content[second:])
    return path


@pytest.mark.parametrize("ending", ENCODED)
def test_every_format_is_read_to_its_end(ending: str, tmp_path: Path) -> None:
    path = encode(tmp_path / f"a.{ending}", chirp(2.3, 200, 900))
    wav = load_audio(path)
    assert wav.dtype == torch.float32 and 2.29 < len(wav) / RATE < 2.45  # codecs pad to whole frames
    report = inspect_audio(path, samples=True)
    assert report.problem is None and report.duration_s == pytest.approx(len(wav) / RATE, abs=1e-3)
    assert inspect_audio(path, samples=False).duration_s == pytest.approx(report.duration_s, abs=0.1)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg:  # where it is at hand, its count of samples is the judge
        command = [ffmpeg, "-v", "quiet", "-i", str(path), "-f", "s16le", "-ac", "1", "-ar", str(RATE), "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        assert len(wav) == pytest.approx(len(raw) / 2, abs=80)


def test_a_vbr_mp3_without_a_frame_count(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros(2 * RATE, np.float32), chirp(2.0, 200, 3000)])  # begins with cheap frames
    path = without_xing(encode(tmp_path / "a.mp3", samples))
    for level in (True, False):
        report = inspect_audio(path, samples=level)
        assert report.problem is None and report.duration_s == pytest.approx(4.1, abs=0.12)


@pytest.mark.parametrize("ending", ["mp3", "opus", "flac"])
def test_recordings_joined_in_one_file_are_all_read(ending: str, tmp_path: Path) -> None:
    one = encode(tmp_path / f"a.{ending}", chirp(1.5, 200, 900))
    joined = tmp_path / f"b.{ending}"
    joined.write_bytes(one.read_bytes() * 3)
    assert len(load_audio(joined)) / RATE == pytest.approx(3 * len(load_audio(one)) / RATE, abs=0.3)
    if ending != "flac":  # of FLAC only decoding finds it
        assert inspect_audio(joined, samples=False).duration_s == pytest.approx(4.5, abs=0.3)


def test_a_truncated_mp3_that_says_how_long_it_is(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp3", chirp(4.0, 200, 900))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for level in (True, False):
        assert "is truncated" in inspect_audio(path, samples=level).problem


def test_a_flac_from_a_pipe(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.flac", chirp(1.5, 200, 900))
    whole, content = load_audio(path), bytearray(path.read_bytes())
    content[21] &= 0xF0  # "total samples unknown"
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert torch.equal(load_audio(path), whole) and inspect_audio(path, samples=False).duration_s == pytest.approx(1.5)


def test_a_wav_from_a_pipe_and_a_truncated_one(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, chirp(1.5, 200, 900), RATE)
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[4:8] = content[place : place + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "pipe.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "pipe.wav")) == 24000
    (tmp_path / "cut.wav").write_bytes(path.read_bytes()[:20000])
    for level in (True, False):  # the header is enough to see it
        assert "is truncated" in inspect_audio(tmp_path / "cut.wav", samples=level).problem
    (tmp_path / "two.wav").write_bytes(path.read_bytes() * 2)
    assert "several concatenated recordings" in inspect_audio(tmp_path / "two.wav", samples=False).problem


@pytest.mark.parametrize(("ending", "options"), [("m4a", {"movflags": "faststart"}), ("webm", {})])
def test_a_truncated_container_is_refused(ending: str, options: dict, tmp_path: Path) -> None:
    path = encode(tmp_path / f"a.{ending}", chirp(3.0, 200, 900), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert (
        "truncated" in inspect_audio(path, samples=True).problem
        or "damaged" in inspect_audio(path, samples=True).problem
    )


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.webm", "a.aac", "a.wav", "a"])
@pytest.mark.parametrize("content", [b"", b"hello\n" * 999, bytes(9999), b"#EXTM3U\n#EXTINF:1,\nsecret.wav\n"])
def test_what_is_no_audio_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "secret.wav", chirp(1.0, 100, 200), RATE)  # a playlist must not open it
    (tmp_path / name).write_bytes(content)
    assert (
        inspect_audio(tmp_path / name, samples=True).problem and inspect_audio(tmp_path / name, samples=False).problem
    )


def test_channels_that_cancel_each_other_are_silence(tmp_path: Path) -> None:
    samples = chirp(1.0, 200, 800)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), RATE)
    report = inspect_audio(tmp_path / "a.wav", samples=True)
    assert report.silent and report.cancelled and float(load_audio(tmp_path / "a.wav").abs().max()) < 1e-4
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "x"}\n')
    with pytest.raises(UserError, match="silent: its channels cancel each other out"):
        data.read_manifest(tmp_path / "m.jsonl", check_audio="samples", refuse_silence=True)


def test_ultrasound_is_silence_for_a_model_at_16_khz(tmp_path: Path) -> None:
    t = np.arange(96000) / 96000
    soundfile.write(
        tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 30000 * t) * np.hanning(len(t)), 96000, subtype="FLOAT"
    )
    assert inspect_audio(tmp_path / "a.wav", samples=True).silent


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "m4a"])
def test_a_segment_is_that_part_of_the_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    if ending in ENCODED:
        encode(path, chirp(3.0, 200, 900))
    else:
        soundfile.write(path, chirp(3.0, 200, 900), RATE)
    whole = load_audio(path)
    torch.testing.assert_close(load_audio(path, 1.25, 0.5), whole[20000:28000])
    torch.testing.assert_close(load_audio(path, 2.5), whole[40000:])
    assert inspect_audio(path, True, 1.25, 0.5).duration_s == pytest.approx(0.5)
    for level in (True, False):
        assert "ends at" in inspect_audio(path, level, 2.0, 5.0).problem


@pytest.mark.parametrize(
    ("line", "seconds", "name"),
    [
        ({"offset": 0.5, "duration": 0.25}, 0.25, "a.wav#0.5+0.25"),
        ({"start": 0.5, "end": 0.75}, 0.25, "a.wav#0.5+0.25"),
        ({"start": 0.5, "duration": 0.25}, 0.25, "a.wav#0.5+0.25"),
        ({"offset": 0.5}, 0.5, "a.wav#0.5"),
        ({"end": 0.25}, 0.25, "a.wav#0+0.25"),
        ({"offset": 0, "duration": 0.25}, 0.25, "a.wav#0+0.25"),
    ],
)
def test_lines_that_name_a_segment(line: dict, seconds: float, name: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 200, 800), RATE)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x"} | line) + "\n")
    for level in ("header", "samples"):
        rows = data.read_manifest(tmp_path / "m.jsonl", check_audio=level)
        assert rows.durations.tolist() == pytest.approx([seconds]) and rows[0]["id"] == name
    ((_, wavs, _),) = data.iterate_batches(rows, 1)
    start = round(rows[0]["offset"] * RATE)
    torch.testing.assert_close(wavs[0], load_audio(tmp_path / "a.wav")[start : start + round(seconds * RATE)])
    again = data.read_manifest(data.write_manifest(tmp_path / "again.jsonl", rows))
    assert list(again) == list(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"offset": -1}, "offset -1 is not a number of seconds"),
        ({"start": "noon"}, "rename the column"),
        ({"offset": 0.9, "end": 0.5}, "is not after offset"),
        ({"offset": 0.2, "end": 0.5, "duration": 1.0}, "lasts 0.300 s"),
        ({"offset": 0.5, "duration": 5.0}, "ends at 1.00 s"),
        ({"offset": 7.0}, "ends at 1.00 s"),
    ],
)
def test_segments_that_cannot_be_are_named(line: dict, message: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 200, 800), RATE)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x"} | line) + "\n")
    with pytest.raises(UserError, match=message):
        data.read_manifest(tmp_path / "m.jsonl")


def test_integers_are_scaled_and_other_samples_refused() -> None:
    wav = torch.from_numpy(chirp(0.1, 200, 800))
    integers = (wav * 32768).round().short()
    found, lens = data.check_wavs(integers[None], torch.ones(1))
    torch.testing.assert_close(found[0], wav, atol=1e-4, rtol=0)
    assert data.check_wavs(integers.numpy(), torch.ones(1))[0].shape == (1, 1600) and lens.tolist() == [1.0]
    for wrong, lengths, message in (
        (integers.float(), torch.ones(1), "divide 16-bit values"),
        (wav, torch.tensor([1600]), "relative lengths from 0 to 1"),
        (wav * torch.nan, torch.ones(1), "NaN"),
        (wav[None, None], torch.ones(1), "must be"),
        (wav.bool(), torch.ones(1), "invalid sample type"),
    ):
        with pytest.raises(UserError, match=message):
            data.check_wavs(wrong, lengths)


def test_wave_modules_16_bit_file_equals_ours(tmp_path: Path) -> None:
    """A segment read by seeking equals what Python's own reader finds there."""
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 200, 800), RATE)
    with wave.open(str(tmp_path / "a.wav")) as file:
        file.setpos(4000)
        expected = np.frombuffer(file.readframes(1000), np.int16) / 32768
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", 0.25, 1000 / RATE).numpy(), expected, atol=1e-7)
