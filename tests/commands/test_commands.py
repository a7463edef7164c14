"""The console script: transcripts in every form, evaluation with fitting defaults, comparison, timing."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TEXTS, chirp, make_corpus

from efficient_asr import commands, load_transcriber
from efficient_asr.commands import evaluate, report, time, transcribe
from efficient_asr.data import batches, inspect_audio, load_audio, load_channels
from efficient_asr.evaluation import comparison, manifest_transcripts, runtime
from efficient_asr.evaluation.model_card import card_text
from efficient_asr.evaluation.result import Result
from efficient_asr.inference import manifest_pass
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel
from efficient_asr.utils.devices import choose_device, devices_to_time
from efficient_asr.utils.errors import UserError


@pytest.fixture
def model(tiny_ctc: CTCModel, tmp_path: Path) -> str:
    torch.nn.init.normal_(tiny_ctc.head.linear.weight, std=2.0)
    tiny_ctc.save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "sub").mkdir(parents=True)
    soundfile.write(folder / "a.wav", chirp(1.0, 100, 500), 16000)
    soundfile.write(folder / "sub" / "b.flac", chirp(0.7, 100, 1500), 16000)
    call = np.stack([chirp(1.0, 100, 500), np.roll(chirp(1.0, 3000, 300), 3000)], axis=1)
    soundfile.write(folder / "sub" / "call.wav", call, 16000)
    return folder


def run(*arguments: object) -> int:
    return commands.main([str(argument) for argument in arguments])


def test_usage_and_unknown_commands(capsys: pytest.CaptureFixture) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in commands.COMMANDS)
    assert commands.main([]) == 2
    assert run("transcrbe", "x") == 2 and "Did you mean 'transcribe'?" in capsys.readouterr().err


def test_a_folder_becomes_one_table_or_a_file_for_each(model: str, recordings: Path, tmp_path: Path) -> None:
    assert run("transcribe", model, recordings, "--out", tmp_path / "t.csv", "--batch_size", 2) == 0
    rows = list(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
    assert [Path(row["audio"]).name for row in rows] == ["a.wav", "b.flac", "call.wav"] and rows[1][
        "duration_s"
    ] == "0.7"
    assert run("transcribe", model, recordings, "--out", tmp_path / "t.json") == 0
    records = json.loads((tmp_path / "t.json").read_text())
    assert [record["text"] for record in records] == [row["text"] for row in rows]  # whatever the batch size
    assert run("transcribe", model, recordings, "--out", tmp_path / "srt", "--format", "srt") == 0
    assert sorted(str(p.relative_to(tmp_path / "srt")) for p in (tmp_path / "srt").rglob("*.srt")) == [
        "a.srt", "sub/b.srt", "sub/call.srt",
    ]  # fmt: skip
    assert "-->" in (tmp_path / "srt" / "a.srt").read_text()
    assert not list(tmp_path.rglob("*.partial*"))
    assert run("transcribe", model, recordings / "a.wav", "--out", tmp_path / "one.txt") == 0
    assert (tmp_path / "one.txt").read_text() == records[0]["text"] + "\n"


def test_calls_are_split_into_parties(model: str, recordings: Path, capsys: pytest.CaptureFixture) -> None:
    call = recordings / "sub" / "call.wav"
    assert run("transcribe", model, call, "--channels", "split", "--names", "agent", "customer") == 0
    record = json.loads(capsys.readouterr().out)
    assert {turn["speaker"] for turn in record["segments"]} == {"agent", "customer"}
    assert run("transcribe", model, call, "--channels", 1) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    channels = load_channels(call)
    assert torch.equal(transcribe.read(call, "1"), channels[1]) and not torch.equal(channels[0], channels[1])
    assert torch.equal(transcribe.read(call, "split"), channels)
    assert run("transcribe", model, call, recordings / "a.wav", "--channels", 1) == 2
    assert "there is no channel 1: the file has 1" in capsys.readouterr().err
    assert run("transcribe", model, call, "--channels", "left") == 2
    assert run("transcribe", model, call, "--names", "agent") == 2 and "--channels split" in capsys.readouterr().err


def test_an_interrupted_command_goes_on(
    model: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = tmp_path / "whole.jsonl"
    assert run("transcribe", model, recordings, "--out", whole) == 0
    read, calls = transcribe.read, []

    def interrupt(path: Path, channels: str) -> torch.Tensor:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(path, channels)

    monkeypatch.setattr(transcribe, "read", interrupt)
    out = tmp_path / "t.jsonl"
    assert run("transcribe", model, recordings, "--out", out) == 130 and not out.exists()
    assert run("transcribe", model, recordings, "--out", out) == 0 and len(calls) == 4
    assert out.read_text() == whole.read_text() and "2 of 3 are already transcribed" in capsys.readouterr().err
    # A recording that has changed is transcribed again, and other options start over.
    for change, options, again in ((True, (), 3), (False, ("--channels", 0), 3), (False, (), 1)):
        calls[:] = []
        out.unlink()
        assert run("transcribe", model, recordings, "--out", out) == 130  # two of three are there
        if change:
            soundfile.write(recordings / "a.wav", chirp(0.6, 500, 300), 16000)
        calls[:] = [None] * 3
        assert run("transcribe", model, recordings, "--out", out, *options) == 0
        assert len(calls) - 3 == (2 if change else again), (change, options)
    assert out.read_text() != whole.read_text()


def test_names_and_folders_that_are_unusual(
    model: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (recordings / "linked").symlink_to(recordings / "sub")
    (recordings / "sub" / "up").symlink_to(recordings)  # a folder in itself
    os.rename(os.fsencode(recordings / "a.wav"), os.fsencode(recordings) + b"/caf\xe9.wav")
    long = "\u0939" * 80 + ".wav"
    soundfile.write(recordings / long, chirp(0.5, 100, 300), 16000)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("transcribe", model, recordings, "--out", ".", "--format", "srt") == 2
    said = capsys.readouterr().err
    assert "the name is not UTF-8" in said and "caf\\udce9.wav" in said and "1 of 4 files" in said
    assert sorted(path.stem for path in Path().rglob("*.srt")) == ["b", "call", long[:-4]]
    assert run("transcribe", model, recordings / "sub" / "call.wav", "--out", "calls [v2].jsonl") == 0
    capsys.readouterr()


def test_bad_recordings_do_not_stop_the_others(
    model: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (recordings / "broken.wav").write_text("no audio")
    assert run("transcribe", model, recordings, "--out", tmp_path / "t.jsonl", "--batch_size", 4) == 2
    said = capsys.readouterr().err
    assert "broken.wav" in said and "1 of 4 files could not be transcribed; a rerun transcribes only these" in said
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 3
    soundfile.write(recordings / "broken.wav", chirp(0.5, 100, 300), 16000)
    assert run("transcribe", model, recordings, "--out", tmp_path / "t.jsonl", "--batch_size", 4) == 0
    assert "3 of 4 are already transcribed" in capsys.readouterr().err and not list(tmp_path.glob("*.partial*"))
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 4
    soundfile.write(recordings / "short.wav", chirp(0.01, 100, 300), 16000)  # shorter than a frame
    assert run("transcribe", model, recordings, "--out", tmp_path / "all.csv", "--channels", "split") == 0
    assert "short.wav" in (tmp_path / "all.csv").read_text() and "has one channel" in capsys.readouterr().err
    assert run("transcribe", model, recordings, "--out", tmp_path / "x.tsv") == 2 and "'tsv'" in capsys.readouterr().err
    assert run("transcribe", model, recordings, "--out", tmp_path / "all.csv", "--format", "txt") == 2
    assert "all.csv is a file" in capsys.readouterr().err
    assert run("transcribe", model, recordings, "--format", "srt") == 2 and "--out" in capsys.readouterr().err
    assert run("transcribe", model, recordings, "--out", tmp_path / "t.srt") == 2
    assert "need a folder" in capsys.readouterr().err
    assert run("transcribe", model, recordings / "a.wav", "--out", tmp_path / "t.srt", "--format", "vtt") == 2
    assert "for their .vtt files" in capsys.readouterr().err


def test_devices() -> None:
    assert choose_device("cpu") == "cpu" and choose_device() in ("cpu", "cuda")
    assert devices_to_time(None, "cpu") == ["cpu"] and devices_to_time("cpu", "cpu") == ["cpu"]
    assert devices_to_time("all", "cpu")[0] == "cpu" and devices_to_time(["cpu", "cpu"], "cpu") == ["cpu"]
    with pytest.raises(UserError, match="--device: invalid device 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="runtime_devices: no usable GPU"):
            devices_to_time(["cpu", "cuda"], "cpu")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def evaluate_into(out: Path, model: str, place: Path, *options: str) -> Result:
    evaluate.main([model, "--manifest", str(place / "test.jsonl"), "--out", str(out), "--device", "cpu", *options])
    return Result.load(out)


def test_forms_of_a_model_are_told_apart(tiny_whispers: dict[str, str], place: Path, tmp_path: Path) -> None:
    """By the variant, in tables and in model cards."""
    options = ["--repeats", "0", "--no_macs", "--language", "en", "--max_new_tokens", "4"]
    names = {"a": [], "b": ["--num_beams", "2"], "c": ["--quantise", "int8"]}
    found = [
        evaluate_into(tmp_path / f"{n}.json", tiny_whispers["small"], place, *options, *o) for n, o in names.items()
    ]
    assert found[1].variant == f"{found[0].variant[: -len(' + max_new_tokens 4')]} + num_beams 2 + max_new_tokens 4"
    assert len({each.variant for each in found}) == 3
    text = card_text(Path(tiny_whispers["small"]), found)
    assert all(f"| test/test, {each.variant} |" in text or f", {each.variant} | real" in text for each in found)
    assert f", {found[0].variant} |" not in card_text(Path(tiny_whispers["small"]), found[:1])


def test_the_normaliser_fits_the_model_and_the_language(
    model: str, tiny_whispers: dict[str, str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quick = ["--repeats", "0", "--no_macs"]
    assert evaluate_into(tmp_path / "a.json", model, place, *quick).normaliser == "plain"
    whisper = evaluate_into(tmp_path / "b.json", tiny_whispers["small"], place, *quick, "--language", "en")
    assert whisper.normaliser == "whisper" and "(normaliser whisper)" in capsys.readouterr().out
    rows = [json.loads(line) | {"language": "de"} for line in (place / "test.jsonl").read_text().splitlines()]
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate_into(tmp_path / "c.json", tiny_whispers["small"], place, *quick).normaliser == "multilingual"
    bare = [{k: v for k, v in row.items() if k != "language"} for row in rows]
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    capsys.readouterr()
    evaluate_into(tmp_path / "e.json", tiny_whispers["small"], place, *quick)
    assert "no language is given; texts are normalised as English" in capsys.readouterr().out
    given = evaluate_into(tmp_path / "d.json", tiny_whispers["small"], place, *quick, "--normaliser", "plain")
    assert given.normaliser == "plain" and given.model_name == "small"


def test_runtimes_can_be_added_later(
    model: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "a.json"
    before = evaluate_into(out, model, place, "--repeats", "0")
    monkeypatch.setattr(runtime, "LONG_S", 0.0)
    manifest = ["--manifest", str(place / "test.jsonl"), "--device", "cpu"]
    time.main([model, str(out), *manifest, "--repeats", "2", "--batch_size", "4"])
    assert "2 runs of 4 utterances, about" in capsys.readouterr().err  # the estimate
    after = Result.load(out)
    assert [(r["device"], r["batch_size"], r["repeats"]) for r in after.runtimes] == [("cpu", 1, 2), ("cpu", 4, 2)]
    assert {**after.to_dict(), "runtimes": []} == {**before.to_dict(), "runtimes": []}
    time.main([model, str(out), *manifest, "--repeats", "1", "--batch_size", "1"])
    assert [(r["batch_size"], r["repeats"]) for r in Result.load(out).runtimes] == [(1, 1), (4, 2)]
    original = time.measure_runtimes

    def meanwhile(*arguments: object) -> object:  # another command adds to the file
        other = Result.load(out)
        other.runtimes.append(other.runtimes[0] | {"batch_size": 16})
        other.save_fields()
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(time, "measure_runtimes", meanwhile)
        time.main([model, str(out), *manifest, "--repeats", "1", "--batch_size", "1"])
    assert [r["batch_size"] for r in Result.load(out).runtimes] == [1, 4, 16]
    with pytest.raises(UserError, match="--lm_alpha"):
        time.main([model, str(out), *manifest, "--lm_alpha", "0.7"])
    lines = (place / "test.jsonl").read_text().splitlines()
    (place / "test.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match="was not measured on the utterances"):
        time.main([model, str(out), *manifest])
    (place / "test.jsonl").write_text("\n".join(lines))
    other = CTCModel.load(model)
    other.encoder.output_norm = not other.encoder.output_norm
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="another model or other decoding options"):
        time.main([str(tmp_path / "other"), str(out), *manifest])


def test_a_comparison_shows_both_and_never_a_p_value_of_zero(
    model: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = evaluate_into(tmp_path / "a.json", model, place, "--repeats", "1")
    rows = first.load_utterances()
    perfect = Result.load(tmp_path / "a.json")
    perfect.experiment, perfect.wer_percent = "b", 0.0
    for row in rows:
        perfect.rows.append(row | {"hypothesis": row["reference"], "errors": 0})
    perfect.save(tmp_path / "b.json")
    capsys.readouterr()
    report.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    said = capsys.readouterr().out
    assert f"| {first.wer_percent:.2f} | {first.macs_g:.3f} |" in said and "| 0.00 |" in said and "CPU s" in said
    assert "p < 0.0002" in said and "p = 0.0000" not in said and f"{len(TEXTS)} utterances" in said
    assert f"{-first.wer_percent:+.2f} points" in said and "different machines" not in said
    perfect.runtimes[0] |= {"threads": 64}
    perfect.save(tmp_path / "b.json")
    report.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "CPU s are of different machines (A " in capsys.readouterr().out
    with pytest.raises(UserError, match="--html and --compare cannot be combined"):
        report.main(["--compare", "a", "b", "--html", str(tmp_path / "x.html")])


@pytest.fixture
def table(recordings: Path, tmp_path: Path) -> Path:
    """A manifest with other column names and fields that are nobody's business."""
    rows = [
        {"path": "recordings/a.wav", "sentence": "One two", "speaker": "x", "page": 7},
        {"path": "recordings/sub/call.wav", "begin": 0.25, "end_s": 0.75, "page": 8},
        {"path": "recordings/sub/b.flac", "page": 9},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_transcripts_stand_beside_the_rows_of_a_manifest(model: str, table: Path, tmp_path: Path) -> None:
    columns = ("--columns", "{audio: path, text: sentence}")
    out = tmp_path / "out.jsonl"
    assert run("transcribe", model, "--manifest", table, *columns, "--out", out, "--batch_size", 2) == 0
    before, after = ([json.loads(line) for line in open(path)] for path in (table, out))
    assert [row["page"] for row in after] == [7, 8, 9]
    assert all(row | old == row for row, old in zip(after, before, strict=True))  # nothing is lost
    assert all(Path(row["audio"]).is_file() for row in after) and after[0]["text"] == "One two"
    transcriber = load_transcriber(model)
    wav = load_audio(after[1]["audio"])[4000:12000]  # the segment, without its batch mates
    assert after[1]["hypothesis"] == transcriber.transcribe(wav[None])[0].text != ""
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


def test_an_interrupted_pass_over_a_manifest_goes_on(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    common = ("--manifest", table, "--columns", "{audio: path}", "--output_column", "said")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("transcribe", model, *common, "--out", whole) == 0
    original, calls = manifest_transcripts.transcribe_rows, []

    def interrupt(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(manifest_transcripts, "transcribe_rows", interrupt)
    assert run("transcribe", model, *common, "--out", out) == 130 and not out.exists()
    assert run("transcribe", model, *common, "--out", out) == 0 and len(calls) == 4
    assert "1 of 3 utterances are transcribed already" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


def test_audio_that_has_changed_is_transcribed_again(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    common = ("--manifest", table, "--columns", "{audio: path}", "--out", tmp_path / "out [1].jsonl")
    heard = []

    def loudness(self: CTCTranscriber, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None) -> list[Transcript]:
        heard.append(f"{float(wavs.std()):.5f}")
        return [Transcript(heard[-1])]

    monkeypatch.setattr(CTCTranscriber, "transcribe", loudness)
    with monkeypatch.context() as patched:
        patched.setattr(manifest_transcripts, "atomic_write", lambda path: 1 / 0)  # all is transcribed, nothing written
        with pytest.raises(ZeroDivisionError):
            run("transcribe", model, *common)
    first = list(heard)
    duration = inspect_audio(tmp_path / "recordings" / "a.wav", samples=False).duration_s
    soundfile.write(tmp_path / "recordings" / "a.wav", 0.5 * chirp(duration, 700, 300), 16000)
    assert run("transcribe", model, *common) == 0
    assert "2 of 3 utterances are transcribed already" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out [1].jsonl")]
    assert len(first) == 3 and len(heard) == 4 and heard[3] not in first
    assert rows[0]["hypothesis"] == heard[3]
    assert not any("file" in row for row in rows)


def test_audio_that_is_replaced_while_it_is_transcribed_is_transcribed_again(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    common, replaced = ("--manifest", table, "--columns", "{audio: path}", "--out", tmp_path / "out.jsonl"), []
    original, audio = manifest_transcripts.transcribe_rows, tmp_path / "recordings" / "a.wav"
    duration = inspect_audio(audio, samples=False).duration_s

    def slow(transcriber: object, rows: list, *arguments: object) -> object:
        if rows[0]["page"] == 7 and not replaced:
            replaced.append(soundfile.write(audio, 0.5 * chirp(duration, 700, 300), 16000))
        return original(transcriber, rows, *arguments)

    monkeypatch.setattr(manifest_transcripts, "transcribe_rows", slow)
    with monkeypatch.context() as patched:
        patched.setattr(manifest_transcripts, "atomic_write", lambda path: 1 / 0)  # all is transcribed, nothing written
        with pytest.raises(ZeroDivisionError):
            run("transcribe", model, *common)
    assert run("transcribe", model, *common) == 0
    assert "2 of 3 utterances are transcribed already" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert rows[0]["hypothesis"] == load_transcriber(model).transcribe_files([audio])[0].text


def test_recordings_that_vanish_or_are_replaced_while_they_are_transcribed(
    model: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    audio, out, heard = recordings / "a.wav", tmp_path / "out.jsonl", []

    def move(self: CTCTranscriber, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None) -> list[Transcript]:
        if not heard:
            audio.rename(tmp_path / "moved.wav")
        elif len(heard) == 1:
            soundfile.write(audio, chirp(0.5, 700, 300), 16000)
        heard.append(wavs.shape[-1])
        return [Transcript(str(wavs.shape[-1]))]

    monkeypatch.setattr(CTCTranscriber, "transcribe", move)
    assert run("transcribe", model, audio, "--out", out) == 0  # the transcript is not lost
    assert json.loads(out.read_text())["text"] == str(heard[0])
    (tmp_path / "moved.wav").rename(audio)
    (tmp_path / "bad.wav").write_text("not audio")  # so that what a rerun needs is kept
    both = (audio, tmp_path / "bad.wav", "--out", tmp_path / "again.jsonl")
    assert run("transcribe", model, *both) == 2 and len(heard) == 2
    assert run("transcribe", model, *both) == 2 and heard[2] == 8000  # the file was replaced: it is transcribed again
    assert run("transcribe", model, *both) == 2 and len(heard) == 3
    for option in (("--columns", "{audio: x}"), ("--output_column", "y"), ("--skip_bad",)):
        assert run("transcribe", model, audio, *option) == 2
        assert f"{option[0]} requires --manifest" in capsys.readouterr().err


def test_unreadable_audio_of_a_manifest(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    common = ("--manifest", table, "--columns", "{audio: path}", "--out", tmp_path / "out.jsonl")
    original = manifest_pass.load_row

    def vanished(row: dict) -> torch.Tensor:  # between the check and the reading
        if row["page"] == 9:
            raise UserError(f"{row['audio']} cannot be read")
        return original(row)

    monkeypatch.setattr(manifest_pass, "load_row", vanished)
    monkeypatch.setattr(batches, "load_row", vanished)
    assert run("transcribe", model, *common) == 2
    assert "or pass --skip_bad True to go on without it" in capsys.readouterr().err
    assert run("transcribe", model, *common, "--skip_bad") == 0
    rows = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert ["hypothesis" in row for row in rows] == [True, True, False] and "b.flac" in rows[2]["hypothesis_problem"]
    assert "1 of 3 utterances could not be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["a.wav", "--manifest", "rows.jsonl"], "AUDIO, --manifest: give either"),
        ([], "AUDIO, --manifest: give either"),
        (["--manifest", "rows.jsonl"], "--out: the rows of a manifest are written as JSON lines"),
        (["--manifest", "rows.jsonl", "--out", "x.csv"], "--out: the rows of a manifest are written as JSON lines"),
        (["--manifest", "rows.jsonl", "--out", "rows.jsonl"], "--out: it is the manifest itself"),
        (["--manifest", "rows.jsonl", "--out", "x.jsonl", "--channels", "split"], "--channels, --names: utterances"),
        (["--manifest", "rows.jsonl", "--out", "x.jsonl", "--columns", "{audio: path}", "--output_column", "page"],
         "--output_column: utterance 'recordings/a.wav' has a field 'page' already"),
        (["--manifest", "none.jsonl", "--out", "x.jsonl"], "none.jsonl"),
    ],
)  # fmt: skip
def test_wrong_options_with_a_manifest(
    options: list[str],
    message: str,
    model: str,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(table.parent)
    content = table.read_bytes()
    assert run("transcribe", model, *options) == 2
    assert message in capsys.readouterr().err and table.read_bytes() == content


# ------------------------------------------------------------ comparisons


def test_models_are_compared_on_the_same_recordings(
    model: str, tiny_ctc: CTCModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    torch.nn.init.normal_(tiny_ctc.head.linear.weight, std=2.0)
    tiny_ctc.save(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    options = ("--manifest", corpus / "test.jsonl", "--timed", 2, "--rounds", 2)
    assert run("compare", f"a={model}", f"b={tmp_path}/other", f"again={model}", *options, "--out", "x.json") == 0
    result = json.loads((tmp_path / "x.json").read_text())
    a, b, again = (result["systems"][name]["corpora"]["all"] for name in ("a", "b", "again"))
    assert a == again and a["difference_percent"] == 0 and a["words"] == 11
    assert b["difference_percent"] == pytest.approx(b["wer_percent"] - a["wer_percent"])
    assert run("evaluate", model, "--manifest", corpus / "test.jsonl", "--repeats", 0, "--out", "alone.json") == 0
    alone = Result.load(tmp_path / "alone.json")
    assert a["wer_percent"] == pytest.approx(alone.wer_percent)
    assert all((tmp_path / f"x.{kind}").is_file() for kind in ("png", "svg", "pdf"))
    assert "again" in (tmp_path / "x.svg").read_text()
    timing = result["timing"]
    assert timing["rounds"] == 2 and timing["utterances"] == 2 and {*timing["systems"]} == {"a", "b", "again"}
    shown = capsys.readouterr().out
    assert "| a |" in shown and "plain normaliser" in shown and "tokens/s" not in shown and "5-grams" not in shown


def test_the_same_texts_with_other_audio_are_another_corpus(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Noisy or coded copies have the same ids, texts and durations."""
    for name in ("clean", "coded"):
        make_corpus(tmp_path / name)
    for row in map(json.loads, open(tmp_path / "coded" / "test.jsonl")):
        path = tmp_path / "coded" / Path(row["audio"]).name
        soundfile.write(path, 0.1 * np.random.default_rng(1).standard_normal(len(load_audio(path))), 16000)
    monkeypatch.chdir(tmp_path)
    manifests = [tmp_path / name / "test.jsonl" for name in ("clean", "coded")]
    common = ("--normaliser", "plain", "--timed", 0, "--out", "x.json")
    says = [row["text"] for row in map(json.loads, open(manifests[0]))]
    monkeypatch.setattr(
        CTCTranscriber,
        "transcribe",
        lambda self, wavs, wav_lens=None: [Transcript(says[0] if wavs.std() < 0.11 else "")],
    )
    assert run("compare", f"a={model}", "--manifest", *manifests, *common) == 0
    both = json.loads((tmp_path / "x.json").read_text())["systems"]["a"]["corpora"]
    assert run("compare", f"a={model}", "--manifest", manifests[1], *common) == 0
    alone = json.loads((tmp_path / "x.json").read_text())["systems"]["a"]["corpora"]["all"]
    found = {name: entry["wer_percent"] for name, entry in both.items()}
    assert alone["wer_percent"] == found["coded"] != found["clean"], found
    # transcripts are kept, but not those of other code or other versions of an engine
    monkeypatch.setattr(CTCTranscriber, "transcribe", lambda self, wavs, wav_lens=None: [Transcript("")])
    for changes, expected in ((False, found["coded"]), (True, 100.0)):
        if changes:
            monkeypatch.setattr(comparison, "code_digest", lambda: "other")
        assert run("compare", f"a={model}", "--manifest", manifests[1], *common) == 0
        alone = json.loads((tmp_path / "x.json").read_text())["systems"]["a"]["corpora"]["all"]
        assert alone["wer_percent"] == expected


def test_a_comparison_says_what_is_wrong(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = make_corpus(tmp_path / "corpus") / "test.jsonl"
    out = ("--manifest", manifest, "--out", tmp_path / "x.json")
    assert run("compare", f"a={model}", f"a={model}", *out) == 2 and "same name" in capsys.readouterr().err
    assert run("compare", f"a={model}", "--manifest", manifest, "--out", tmp_path / "x.csv") == 2
    assert "must end in .json" in capsys.readouterr().err
    assert run("compare", f"a={model}", "--manifest", manifest, manifest, "--out", tmp_path / "x.json") == 2
    assert "are not distinct" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("compare", model, *out)
    assert "is not NAME=MODEL" in capsys.readouterr().err
