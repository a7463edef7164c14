"""Pseudo-labels: what a row says, continuing after a kill, the filter and its report, packing, Ray."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TEXTS, chirp
from runs import CONTEXT

from efficient_asr.data import Rows, load_audio, read_manifest
from efficient_asr.inference.manifest_pass import unfinished
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.techniques.pseudo_labelling import labelling, labels, packing
from efficient_asr.techniques.pseudo_labelling.filtering import Rules, read_labels, write_filtered
from efficient_asr.techniques.pseudo_labelling.labelling import write_labels
from efficient_asr.techniques.pseudo_labelling.labels import Labeller, confidences
from efficient_asr.techniques.pseudo_labelling.packing import groups, write_packed
from efficient_asr.utils.errors import UserError

HPARAMS: dict[str, Any] = {
    "normaliser": "plain", "timestamps": False, "batch_size": 3, "max_batch_length_s": None, "ray_address": None,
    "ray_workers": None, "language": "en", "skip_bad": False,
}  # fmt: skip


class Says(Transcriber):
    """Says the same thing of everything; with pieces, as of long audio."""

    def __init__(self, text: str = "one two", **details: Any) -> None:
        self.found = Transcript(text, details)

    def transcribe(self, wavs: torch.Tensor, wav_lens: Any = None, languages: Any = None) -> list[Transcript]:
        return [self.found] * len(wavs)


def labeller(transcriber: Transcriber, **options: Any) -> Labeller:
    made = object.__new__(Labeller)
    made.transcriber, made.normaliser, made.timestamps, made.language = transcriber, None, False, None
    made.dropped = {"text", "segments", "split", "sentence", *labels.JUDGED}
    made.__dict__ |= options
    return made


def make_manifest(folder: Path, count: int, texts: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", chirp(0.5 + 0.1 * (i % 7), 100 + 50 * i, 400 + 90 * i), 16000)
        rows.append({"id": f"u{i}", "audio": f"{i}.wav", "note": i} | ({"text": TEXTS[i % 4]} if texts else {}))
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.jsonl"


def row_of(**more: Any) -> dict[str, Any]:
    return {"id": "a", "text": "x y", "duration": 3.0, "compression_ratio": 1.0, "avg_logprob": -0.2} | more


# ------------------------------------------------------------ what a row says


def test_a_labelled_row_keeps_everything_and_says_how_good_the_label_is() -> None:
    details = {"avg_logprob": -0.123456, "tokens": 4, "no_speech_prob": 0.01}
    row = {"id": "a", "text": "The cat, sat down!", "duration": 1.0, "speaker": "s", "mine": [1]}
    found = labeller(Says("the cad SAT", **details)).label(row, Says("the cad SAT", **details).found)
    assert found["origin_text"] == row["text"] and found["text"] == "the cad SAT"
    assert found["wer_percent"] == 50.0  # normalised, by words: one substitution and one deletion of four
    assert found["cer_percent"] == 37.5  # "the cat sat down": one substitution and five deletions of 16
    assert found["avg_logprob"] == -0.1235 and found["no_speech_prob"] == 0.01
    assert found["speaker"] == "s" and found["mine"] == [1]


def test_a_label_does_not_choose_a_split_nor_stand_beside_the_text_it_replaces() -> None:
    row = {"id": "a", "text": "old", "sentence": "old", "split": "dev", "duration": 1.0}
    found = labeller(Says("new")).label(row, Says("new").found)
    assert found["origin_split"] == "dev" and "split" not in found and "sentence" not in found
    assert found["text"] == "new" and found["origin_text"] == "old"


def test_the_language_is_the_one_that_the_teacher_wrote() -> None:
    pieces = Says(
        "a b", segments=[{"text": "a", "language": "nl"}, {"text": "b", "language": "nl"}, {"language": "de"}]
    )
    row = {"id": "a", "duration": 60.0}
    assert labeller(pieces).label(row, pieces.found)["language"] == "nl"
    assert labeller(pieces, language="fr").label(row, pieces.found)["language"] == "fr"
    assert labeller(pieces, language="fr").label(row | {"language": "es"}, pieces.found)["language"] == "fr"
    assert labeller(pieces).label(row | {"language": "es"}, pieces.found)["language"] == "nl"  # it was not told
    told = Says("a b")
    assert labeller(told).label(row | {"language": "es"}, told.found)["language"] == "es"  # it hears none
    pieces.takes_languages = True
    assert labeller(pieces).label(row | {"language": "es"}, pieces.found)["language"] == "es"


def test_a_second_teacher_is_compared_with_the_original_text() -> None:
    first, second = Says("the cow", avg_logprob=-0.1, tokens=2, unfinished=True), Says("the cat")
    row = labeller(first).label({"id": "a", "duration": 1.0, "text": "the cat"}, first.found)
    assert (
        row["wer_percent"] == 50.0
        and row["unfinished"]
        and Rules(max_error_percent=None).reasons(row) == ["unfinished"]
    )
    again = labeller(second).label(row | {"reasons": ["WER"]}, second.found)
    assert again["origin_text"] == "the cat" and again["wer_percent"] == 0.0 and again["avg_logprob"] is None
    assert "unfinished" not in again and "reasons" not in again
    unknown = labeller(first).label({"id": "a", "duration": 1.0}, first.found)
    assert "origin_text" not in labeller(second).label(unknown, second.found)  # the text is a label


def test_audio_without_text_has_no_error_rate() -> None:
    found = labeller(Says("so be it", avg_logprob=-0.5, tokens=3, language="fr")).label(
        {"id": "a", "duration": 1.0}, Says("so be it", avg_logprob=-0.5, tokens=3, language="fr").found
    )
    assert "origin_text" not in found and "wer_percent" not in found and found["language"] == "fr"


def test_scripts_without_spaces_are_compared_by_character() -> None:
    rates = labeller(Says())._rates("今天天气很好", "今天天汽很好", "zh")
    assert rates == {"wer_percent": pytest.approx(100 / 6, abs=0.01), "cer_percent": pytest.approx(100 / 6, abs=0.01)}


def test_traditional_and_simplified_characters_count_as_the_same() -> None:
    pytest.importorskip("opencc")
    assert labeller(Says(), normaliser="chinese")._rates("語音識別", "语音识别", "zh")["cer_percent"] == 0.0
    assert labeller(Says())._rates("語音識別", "语音识别", "zh")["cer_percent"] > 0


def test_confidence_of_pieces_is_the_mean_over_tokens_and_the_highest_silence() -> None:
    parts = [
        {"avg_logprob": -1.0, "tokens": 1, "no_speech_prob": 0.2, "text": "two segments"},
        {"avg_logprob": -1.0, "tokens": 1, "no_speech_prob": 0.2, "text": "of one piece"},
        {"avg_logprob": -0.25, "tokens": 5, "no_speech_prob": 0.7},
        {"text": "no details"},
    ]
    found = confidences(Transcript("a b", {"segments": parts}))
    assert found["avg_logprob"] == round((2 * -1.0 + 6 * -0.25) / 8, 4) and found["no_speech_prob"] == 0.7
    assert confidences(Transcript("a b"))["avg_logprob"] is None


# ------------------------------------------------------------ the pass


def test_batches_of_an_interrupted_pass_are_those_of_a_whole_one() -> None:
    rows = Rows.of([{"id": f"u{i}", "duration": 1.0} for i in range(5)])
    assert unfinished(rows, [[4, 3], [2, 1], [0]], {"u4", "u2", "u1"}) == [[4, 3], [0]]


def test_a_rerun_does_nothing_and_other_settings_are_refused(
    tiny_whispers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_manifest(make_manifest(tmp_path / "in", 5), need_text=False)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["small"]}
    out = write_labels(rows, hparams, tmp_path / "out", "cpu")
    first = out.read_bytes()
    assert [json.loads(line)["id"] for line in first.splitlines()] == [
        f"u{i}" for i in range(5)
    ]  # the manifest's order
    assert json.loads(first.splitlines()[2])["note"] == 2
    write_labels(rows, hparams, tmp_path / "out", "cpu")
    assert out.read_bytes() == first and "labelled already" in capsys.readouterr().out
    for change, name in (({"language": None}, "options"), ({"batch_size": 2}, "batches")):
        with pytest.raises(UserError, match=f"a different {name}"):
            write_labels(rows, hparams | change, tmp_path / "out", "cpu")
    for others in (rows[:4], rows.map(lambda row: row | {"speaker": "new"})):
        with pytest.raises(UserError, match="a different manifest"):
            write_labels(others, hparams, tmp_path / "out", "cpu")
    with pytest.raises(UserError, match="text 7 is not a string"):
        write_labels(rows.map(lambda row: row | {"text": 7}), hparams, tmp_path / "out", "cpu")
    assert out.read_bytes() == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "labels.jsonl").write_text("{}\n" * 5)
    with pytest.raises(UserError, match="was not written by this command"):
        write_labels(rows, hparams, tmp_path / "mine", "cpu")
    assert (tmp_path / "mine" / "labels.jsonl").read_text() == "{}\n" * 5


def test_lines_that_were_deleted_are_labelled_again_and_no_others(
    tiny_whispers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_manifest(make_manifest(tmp_path / "in", 7), need_text=False)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["small"]}
    out = write_labels(rows, hparams, tmp_path / "out", "cpu")
    whole, seen, original = out.read_bytes(), [], Labeller.__call__

    def label(self: Labeller, batch: Any, *audio: torch.Tensor) -> Any:
        seen.extend(row["id"] for row in batch)
        return original(self, batch, *audio)

    monkeypatch.setattr(Labeller, "__call__", label)
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))  # without u0
    assert write_labels(rows, hparams, tmp_path / "out", "cpu").read_bytes() == whole
    assert seen == ["u2", "u1", "u0"]  # its batch: alone, it could sound different in the last bit


def test_a_file_that_cannot_be_read_costs_no_label(
    tiny_whispers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(tmp_path / "in", 7)
    rows = read_manifest(manifest, need_text=False)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["small"]}
    rows = rows.map(lambda row: row | {"problem": "noisy"})  # a column of the user
    (tmp_path / "en").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder with the name of an option's value
    whole = [
        json.loads(line) for line in write_labels(rows, hparams, tmp_path / "whole", "cpu").read_text().splitlines()
    ]
    content = (tmp_path / "in/3.wav").read_bytes()
    (tmp_path / "in/3.wav").write_bytes(content[:44])
    with pytest.raises(UserError, match=r"utterance 'u3'.*or pass --skip_bad True"):
        write_labels(rows, hparams, tmp_path / "out", "cpu")
    out = write_labels(rows, hparams | {"skip_bad": True}, tmp_path / "out", "cpu")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in found] == [
        (row["id"], row["text"]) for row in whole if row["id"] != "u3"
    ]
    unreadable = tmp_path / "out" / "unreadable.jsonl"
    assert json.loads(unreadable.read_text())["id"] == "u3"
    first = out.stat().st_mtime_ns
    write_labels(rows, hparams | {"skip_bad": True}, tmp_path / "out", "cpu")
    assert out.stat().st_mtime_ns == first  # it is complete
    (tmp_path / "in/3.wav").write_bytes(content)
    write_labels(rows, hparams, tmp_path / "out", "cpu")
    assert [json.loads(line) for line in out.read_text().splitlines()] == whole and not unreadable.exists()


def test_a_repaired_file_costs_no_other_label(
    tiny_whispers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_manifest(make_manifest(tmp_path / "in", 7), need_text=False)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["small"]}
    whole = write_labels(rows, hparams, tmp_path / "whole", "cpu").read_bytes()
    content = (tmp_path / "in/3.wav").read_bytes()
    (tmp_path / "in/3.wav").write_bytes(content[:44])
    with pytest.raises(UserError, match=r"utterance 'u3'"):
        write_labels(rows, hparams, tmp_path / "out", "cpu")
    (tmp_path / "in/3.wav").write_bytes(content)
    seen, original = [], Labeller.__call__

    def label(self: Labeller, batch: Any, *audio: torch.Tensor) -> Any:
        seen.extend(row["id"] for row in batch)
        return original(self, batch, *audio)

    monkeypatch.setattr(Labeller, "__call__", label)
    assert write_labels(rows, hparams, tmp_path / "out", "cpu").read_bytes() == whole
    assert "u3" in seen and len(seen) < len(rows)


def test_a_language_that_the_teacher_lacks_is_named_before_the_start(tmp_path: Path) -> None:
    from conftest import multilingual_whisper

    multilingual_whisper(0).save(tmp_path / "teacher")
    rows = read_manifest(make_manifest(tmp_path / "in", 3), need_text=False)
    rows = rows.map(lambda row: row | ({"language": "ja"} if row["id"] == "u1" else {}))
    hparams = HPARAMS | {"teacher_model": str(tmp_path / "teacher"), "language": "manifest"}
    with pytest.raises(UserError, match=r"utterance 'u1'.*'ja'"):
        write_labels(rows, hparams, tmp_path / "out", "cpu")


def _label(manifest: Path, hparams: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    real = Labeller.__call__

    def slowly(self: Labeller, *arguments: Any) -> Any:
        time.sleep(0.1)
        return real(self, *arguments)

    Labeller.__call__ = slowly
    write_labels(read_manifest(manifest, need_text=False), hparams, folder, "cpu")


@pytest.mark.slow
def test_five_kills_change_no_byte(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "in", 40)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["large"]}
    write_labels(read_manifest(manifest, need_text=False), hparams, tmp_path / "whole", "cpu")
    generator, seen = random.Random(5), []
    part = tmp_path / "killed" / "labels.part-0"
    for _ in range(5):
        process = CONTEXT.Process(target=_label, args=(manifest, hparams, tmp_path / "killed"))
        process.start()
        before = len(part.read_bytes().splitlines()) if part.is_file() else 0
        while process.is_alive() and (len(part.read_bytes().splitlines()) if part.is_file() else 0) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
        process.join()
        seen.append(len(part.read_bytes().splitlines()) if part.is_file() else -1)
    assert seen == sorted(seen) and 1 < seen[0] < seen[-1] <= 41, seen  # each went on; the first line is the key
    write_labels(read_manifest(manifest, need_text=False), hparams, tmp_path / "killed", "cpu")
    assert (tmp_path / "killed/labels.jsonl").read_bytes() == (tmp_path / "whole/labels.jsonl").read_bytes()
    assert not part.exists()


@pytest.mark.slow
def test_ten_thousand_utterances_need_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", chirp(0.1, 100, 400), 16000)
    lines = (json.dumps({"id": f"u{i}", "audio": "a.wav", "duration": 0.1, "text": "one two"}) for i in range(10_000))
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(labels, "load_transcriber", lambda *_, **__: Says(avg_logprob=-0.1, tokens=2))
    monkeypatch.setattr(labelling, "fingerprint", str)
    rows = read_manifest(tmp_path / "m.jsonl", need_text=False)
    tracemalloc.start()
    out = write_labels(rows, HPARAMS | {"teacher_model": "x", "batch_size": 64}, tmp_path / "out", "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with open(out) as file:
        assert sum(1 for _ in file) == 10_000
    assert peak < 10_000 * 1_500  # ids and places; texts and audio are not kept


@pytest.mark.slow
def test_ray_gives_the_same_bytes_when_a_node_dies(tiny_whispers: dict[str, str], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    manifest = make_manifest(tmp_path / "in", 30)
    rows = read_manifest(manifest, need_text=False)
    hparams = HPARAMS | {"teacher_model": tiny_whispers["large"], "batch_size": 1}
    whole = write_labels(rows, hparams, tmp_path / "whole", "cpu")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    real = labelling.keep
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        state = {"left": 3}

        def and_kill(*arguments: Any) -> None:
            real(*arguments)
            state["left"] -= 1
            if state["left"] == 0:
                cluster.remove_node(second, allow_graceful=False)

        labelling.keep = and_kill
        out = write_labels(rows, hparams | {"ray_address": cluster.address, "ray_workers": 2}, tmp_path / "ray", "cpu")
        assert state["left"] < 0  # it was killed, and others were labelled after it
        assert out.read_bytes() == whole.read_bytes()
    finally:
        labelling.keep = real
        ray.shutdown()
        cluster.shutdown()


# ------------------------------------------------------------ filter


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        (row_of(origin_text="x z", wer_percent=10.0), []),
        (row_of(origin_text="x z", wer_percent=10.1), ["WER"]),
        (row_of(origin_text="x z", wer_percent=0.0, avg_logprob=-5.0), []),  # the text says enough
        (row_of(origin_text="[noise]", wer_percent=None, avg_logprob=-5.0), ["log-probability"]),  # it says nothing
        (row_of(avg_logprob=-1.01), ["log-probability"]),
        (row_of(no_speech_prob=0.7), ["silence"]),
        (row_of(compression_ratio=2.5, duration=31.0), ["repetition", "too long"]),
        (row_of(text=" ", avg_logprob=None), ["empty text"]),
        (row_of(unfinished=True), ["unfinished"]),
    ],
)
def test_reasons(row: dict[str, Any], reasons: list[str]) -> None:
    assert Rules().reasons(row) == reasons
    nothing = Rules(
        max_error_percent=None, min_avg_logprob=None, max_no_speech_prob=None, max_repetition=None, max_duration_s=None
    )
    assert nothing.reasons(row) == [reason for reason in reasons if reason in ("empty text", "unfinished")]


def test_character_error_rates_can_decide_instead() -> None:
    row = row_of(origin_text="x z", wer_percent=50.0, cer_percent=5.0)
    assert Rules("cer").reasons(row) == [] and Rules("wer").reasons(row) == ["WER"]
    with pytest.raises(UserError, match="filter_metric"):
        Rules("ter")


def test_the_report_counts_what_was_left_out(tmp_path: Path) -> None:
    known = [row_of(id=f"k{i}", origin_text="t", wer_percent=w) for i, w in enumerate((0.0, 5.0, 12.0, 30.0, 150.0))]
    free = [row_of(id=f"f{i}", avg_logprob=-p) for i, p in enumerate((0.1, 3.0))]
    report = write_filtered([*known, *free], Rules(), tmp_path)
    assert report["utterances"] == {"kept": 3, "left_out": 4} and report["reasons"] == {"WER": 3, "log-probability": 1}
    shares = report["left_out_percent_by_max_error"]
    assert (shares["100"], shares["20"], shares["10"], shares["5"]) == (20.0, 40.0, 60.0, 60.0)  # higher is left out
    assert [row["id"] for row in read_labels(tmp_path / "filtered.jsonl")] == ["k0", "k1", "f0"]
    assert {row["id"]: row["reasons"] for row in read_labels(tmp_path / "left_out.jsonl")}["f1"] == ["log-probability"]
    assert (tmp_path / "filter_report.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "filter_report.json").read_text())["with_text"] == 5


def test_what_is_no_label_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run recipes/pseudo_labelling/label\.py"):
        list(read_labels(tmp_path / "labels.jsonl"))
    (tmp_path / "labels.jsonl").write_text('{"id": "a", "text": "b", "duration": 1}\n{"id": \n')
    with pytest.raises(UserError, match="line 2: damaged"):
        list(read_labels(tmp_path / "labels.jsonl"))
    with pytest.raises(UserError, match="'a' has no labels"):
        Rules().reasons({"id": "a", "text": "b", "duration": 1})


# ------------------------------------------------------------ packing


def test_packs_have_one_speaker_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packing, "load_row", lambda row: torch.zeros(round(16000 * row["duration"] + row.get("more", 0)))
    )
    rows = [{"id": str(i), "duration": d, "speaker": s} for i, (d, s) in enumerate(
        ((10.0, "a"), (15.0, "a"), (5.01, "a"), (3.0, "b"), (40.0, "b"), (2.0, "b"))
    )]  # fmt: skip
    assert [[row["id"] for row, _ in group] for group in groups(rows, 30.0)] == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert [[row["id"] for row, _ in group] for group in groups(rows[:3], 30.02)] == [["0", "1", "2"]]
    longer = [row | {"duration": 10.0, "speaker": "a", "more": 1000} for row in rows[:3]]  # than the manifest says
    assert [len(group) for group in groups(longer, 30.0)] == [2, 1]


def test_packs_have_one_language_and_times_on_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "load_row", lambda row: torch.ones(row["samples"]))
    rows = [
        {"id": str(i), "speaker": "a", "language": language, "samples": samples, "text": "x"}
        for i, (language, samples) in enumerate([("en", 8001), ("en", 9600), ("de", 8000)])
    ]
    first, second = groups(rows, 30.0)
    assert [[row["id"] for row, _ in group] for group in (first, second)] == [["0", "1"], ["2"]]
    wav, pack = packing.join(first)
    start_s = pack["segments"][1]["start_s"]
    assert start_s == 0.52 and wav[8001 : round(start_s * 16000)].eq(0).all() and wav[round(start_s * 16000)] == 1
    assert len(wav) == round(start_s * 16000) + 9600


def test_packed_audio_and_times_are_those_of_the_utterances(tmp_path: Path) -> None:
    rows = [
        row | {"speaker": "s", "text": f"text {i}"}
        for i, row in enumerate(read_manifest(make_manifest(tmp_path / "in", 4)))
    ]
    rows[1]["segments"] = [{"start_s": 0.1, "end_s": 0.3, "text": "inner"}]
    out = write_packed(rows, tmp_path, 2.0)
    packs = list(read_manifest(out))
    (tmp_path / "packed" / "former.flac").touch()
    written = os.stat(packs[0]["audio"]).st_mtime_ns
    write_packed(rows, tmp_path, 2.0)  # caches of what was computed from it stay valid
    assert [*(tmp_path / "packed").iterdir()] == [Path(packs[0]["audio"])]
    assert os.stat(packs[0]["audio"]).st_mtime_ns == written
    assert [pack.get("packed") for pack in packs] == [["u0", "u1", "u2"], None]  # 0.5 + 0.6 + 0.7 s, and 0.8 alone
    assert packs[0]["id"].startswith("packed-")
    wav, first = load_audio(packs[0]["audio"]), load_audio(rows[0]["audio"])
    start = -(-len(first) // 320) * 320
    np.testing.assert_allclose(wav[: len(first)], first, atol=1e-4)
    np.testing.assert_allclose(wav[start : start + 100], load_audio(rows[1]["audio"])[:100], atol=1e-4)
    assert packs[0]["text"].startswith("text 0 text 1") and packs[0]["duration"] == len(wav) / 16000
    segments = packs[0]["segments"]
    assert segments[1] == {
        "start_s": round(start / 16000 + 0.1, 3),
        "end_s": round(start / 16000 + 0.3, 3),
        "text": "inner",
    }
    assert all(0 <= a["start_s"] < a["end_s"] <= packs[0]["duration"] for a in segments)
