"""Several languages at once: batches, learning rates, languages told to a transcriber, WER by language, BLEU, tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from conftest import chirp, multilingual_whisper

from efficient_asr.data import BatchOrder, Rows
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.evaluation.records import Records
from efficient_asr.inference.long_audio import LongAudio
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.reporting.pages import fill_markers
from efficient_asr.techniques.clsr.report import draw_gates, experts_table
from efficient_asr.text.normalise import get_normaliser, join_signs
from efficient_asr.training.schedules import LinearSchedule
from efficient_asr.utils.errors import UserError


def test_batches_of_one_language() -> None:
    groups = np.array([0, 1, 2] * 7)
    order = BatchOrder(np.linspace(1, 3, 21), "random", 4, seed=3, groups=groups)
    assert sorted(i for batch in order.batches for i in batch) == list(range(21))
    assert all(len({groups[i] for i in batch}) == 1 for batch in order.batches)
    assert len({int(groups[batch[0]]) for batch in order.batches[:4]}) > 1  # not one language after the other
    mixed = BatchOrder(np.linspace(1, 3, 21), "random", 4, seed=3)
    assert any(len({groups[i] for i in batch}) > 1 for batch in mixed.batches)


def test_learning_rate_goes_up_and_down_in_straight_lines() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LinearSchedule(1.0, 0.25)
    schedule.start(optimizer, 8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.on_batch_end(optimizer)
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert optimizer.param_groups[0]["lr"] == 0.0
    other = LinearSchedule(1.0, 0.25)
    other.load_state_dict({"step": 3, "lr": 1.0})
    other.start(optimizer, 8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5 / 6)
    with pytest.raises(UserError, match="warmup_ratio"):
        LinearSchedule(1.0, 1.5)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("今日は good天気です。", "ja", "今 日 は good 天 気 で す"),
        ("สวัสดี ที่นี่!", "th", "ส วั ส ดี ที่ นี่"),
        ("नमस्ते, दुनिया", "hi", "नमस्ते दुनिया"),
        ("Größe «ja» [leise]", "de", "größe ja"),
        ("It's the colour of 2 dogs", "en", "it is the color of 2 dogs"),
    ],
)
def test_normaliser_for_many_scripts(text: str, language: str, expected: str) -> None:
    assert get_normaliser("multilingual")(text, language) == expected


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    found = []
    for i, (language, text) in enumerate([("de", "guten tag"), ("fr", "bon jour madame"), ("de", "ja")]):
        soundfile.write(tmp_path / f"{i}.wav", chirp(0.6 + i / 10, 100, 500), 16000)
        found.append({
            "id": f"u{i}", "audio": str(tmp_path / f"{i}.wav"), "duration": 0.6 + i / 10, "text": text, "language": language,
            "translation": ["Good day.", "Good day, madam.", "Yes."][i],
        })  # fmt: skip
    return found


class Told(Transcriber):
    """Says what it was told."""

    takes_languages = True
    window_s = 2.0

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list | None = None) -> list[Transcript]:
        return [Transcript({"de": "guten tag", "fr": "bon jour monsieur"}[a]) for a in languages]


def test_each_language_is_told_and_scored(rows: list[dict]) -> None:
    for transcriber in (Told(), LongAudio(Told())):
        result = evaluate(
            transcriber, Benchmark("x", "test", Rows.of(rows)), repeats=1, batch_size=2, measure_macs=False
        )
        found = result.details["languages"]
        assert (found["de"]["utterances"], found["fr"]["utterances"]) == (2, 1)
        assert found["de"]["wer_percent"] == pytest.approx(100 * 2 / 3)  # "ja": one substituted, one inserted
        assert found["fr"]["wer_percent"] == pytest.approx(100 / 3)
        assert result.details["macro_wer_percent"] == pytest.approx(50.0)
        assert result.wer_percent == pytest.approx(50.0)
    alone = evaluate(Told(), Benchmark("x", "test", Rows.of(rows[:1])), repeats=0, measure_macs=False)
    assert "languages" not in alone.details


def test_whisper_takes_the_language_of_each_line(rows: list[dict]) -> None:
    model = multilingual_whisper(seed=1)
    told = WhisperTranscriber(model, "manifest")
    wavs = torch.from_numpy(np.stack([chirp(1.0, 100, 500)] * 3))
    both = told.transcribe(wavs, torch.ones(3), languages=["de", "fr", None])
    for language, transcript in zip(("de", "fr", None), both, strict=True):
        (expected,) = WhisperTranscriber(model, language).transcribe(wavs[:1], torch.ones(1))
        assert transcript.text == expected.text
    long = LongAudio(told, "overlap")
    (expected,) = LongAudio(WhisperTranscriber(model, "de"), "overlap").transcribe(
        torch.cat([wavs[:1]] * 3, dim=1), torch.ones(1)
    )
    (found,) = long.transcribe(torch.cat([wavs[:1]] * 3, dim=1), torch.ones(1), languages=["de"])
    assert found.text == expected.text


def test_characters_are_counted_without_the_spaces_between_signs() -> None:
    rows = [{"id": "u", "audio": "x", "duration": 1.0, "text": "你好世界", "language": "zh"}]
    benchmark = Benchmark("x", "test", Rows.of(rows), normaliser="multilingual")
    assert benchmark.references == ["你 好 世 界"]
    assert [join_signs(a) for a in ("你 好 good 世 界", "one two", "ที่ นี่", "")] == [
        "你好 good 世界",
        "one two",
        "ที่นี่",
        "",
    ]
    records = Records()
    records.append({"id": "u", "duration": 1.0, "reference": "你 好 世 界", "hypothesis": "你 好 世 间", "errors": 1})
    result = evaluate(Translator(), benchmark, repeats=0, measure_macs=False, records=records)
    assert (result.wer_percent, result.cer_percent) == (25.0, 25.0)


class Translator(Transcriber):
    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        return [Transcript("Good day.") for _ in wavs]


def test_translations_are_scored_with_bleu(rows: list[dict], capsys) -> None:
    benchmark = Benchmark("x", "test", Rows.of(rows), normaliser="whisper", task="translate")
    assert benchmark.references[1] == "good day madam"
    result = evaluate(Translator(), benchmark, repeats=0, measure_macs=False)
    references = [[row["translation"] for row in rows]]
    assert result.details["bleu"] == pytest.approx(sacrebleu.corpus_bleu(["Good day."] * 3, references).score)
    assert "version" in result.details["bleu_signature"]
    assert benchmark.hash != Benchmark("x", "test", Rows.of(rows), normaliser="whisper").hash
    del rows[1]["translation"]
    part = Benchmark("x", "test", Rows.of(rows), task="translate")
    assert [row["id"] for row in part.rows] == ["u0", "u2"] and "1 of 3 utterances" in capsys.readouterr().out
    with pytest.raises(UserError, match="no utterance of x/test"):
        Benchmark("x", "test", Rows.of(rows[1:2]), task="translate")


# ---------------------------------------------------------------- the table of reproduce_experts.sh


def write_run(folder: Path, variant: str, seed: int, split: str, wer: float, **details: object) -> None:
    from efficient_asr.evaluation.result import Result

    languages = {
        "languages": {"de": {"wer_percent": wer}, "nl": {"wer_percent": wer + 2}},
        "macro_wer_percent": wer + 1,
    }
    run = Result(
        experiment=f"{variant}_{seed}-{split}", recipe="r", technique="clsr", variant=variant, corpus="c", split=split,
        benchmark_hash=split, utterances=3, audio_s=1.0, reference_words=9, wer_percent=wer, macs_g=21.0,
        provenance={"date": f"2026-01-0{seed}"}, details=languages | {"macro_cer_percent": 3.0} | details,
        wer_ci95_percent=None, cer_percent=1.0, substitutions=0, deletions=0, insertions=0, wer_lm_percent=None, parameters=1,
        macs_g_per_audio_s=None, macs_thop_g=None, runtimes=[], hparams={}, synthetic=False, normaliser="plain", lm=None,
    )  # fmt: skip
    run.save(folder)


def test_table_of_methods_by_language(tmp_path: Path) -> None:
    for seed, wer in ((1, 20.0), (2, 22.0)):
        usage = {"encoder.0": 0.5, "decoder.0": 1.0}
        write_run(
            tmp_path / "experts" / "tiny",
            "JS",
            seed,
            "in_domain",
            wer,
            gate_usage=usage,
            trained_parameters=2e6,
            megabytes_per_language=4.0,
        )
        write_run(tmp_path / "experts" / "tiny", "JS", seed, "english", 6.0)
    from efficient_asr.reporting.results import load_runs

    runs = load_runs(tmp_path / "experts" / "tiny")
    table = experts_table(runs)
    assert "| JS | 2 | 2.00 | 4.0 | 21.00 | 21.0 ± 1.0 | 23.0 ± 1.0 | 22.0 ± 1.0 | 3.0 ± 0.0 | 6.0 ± 0.0 |" in table
    text = fill_markers("a\n<!-- experts tiny -->\nold\n<!-- /experts -->\nb", [], [], tmp_path)
    assert table in text and "old" not in text
    with pytest.raises(UserError, match="nothing"):
        fill_markers("<!-- experts nothing -->\n<!-- /experts -->", [], [], tmp_path)
    assert draw_gates(runs, tmp_path / "gates.png").stat().st_size > 1000
    write_run(tmp_path / "experts" / "tiny", "KL", 1, "in_domain", 9.0)
    assert "| KL | 1 | – | – | 21.00 | 9.0 | 11.0 | 10.0 | 3.0 | – |" in experts_table(
        load_runs(tmp_path / "experts" / "tiny")
    )
    path = tmp_path / "experts" / "tiny" / "KL_1-in_domain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"benchmark_hash": "another"}))
    with pytest.raises(UserError, match="KL_1"):
        experts_table(load_runs(tmp_path / "experts" / "tiny"))


def test_experts_in_other_layers_share_a_picture(tmp_path: Path) -> None:
    from efficient_asr.reporting.results import load_runs

    for order in (("decoder.0",), ("encoder.0", "encoder.1", "decoder.0")):
        write_run(
            tmp_path / "experts" / "tiny",
            f"{len(order)} layers",
            1,
            "in_domain",
            9.0,
            gate_usage=dict.fromkeys(order, 0.5),
        )
    assert draw_gates(load_runs(tmp_path / "experts" / "tiny"), tmp_path / "gates.png").stat().st_size > 1000


def test_table_of_settings_on_the_validation_split(tmp_path: Path) -> None:
    from efficient_asr.reporting.results import load_runs

    write_run(tmp_path / "tuning", "LoRA, lr 0.1", 1, "whole_dev", 9.0)
    runs = load_runs(tmp_path / "tuning")
    table = experts_table(runs)
    assert table.startswith("Real speech; whole_dev 3 utterances, 9 words.\n") and "English" not in table
    assert "| LoRA, lr 0.1 | 1 | – | – | 21.00 | 9.0 | 11.0 | 10.0 | 3.0 |" in table
    assert draw_gates(runs, tmp_path / "gates.png") is None  # nobody has gates
