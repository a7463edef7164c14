from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.pages import fill_markers
from efficient_asr.reporting.plots import _costs, pareto_front, plot, plot_name
from efficient_asr.reporting.published import load_published
from efficient_asr.reporting.results import check_comparable, group_runs, load_runs
from efficient_asr.reporting.tables import make_table
from efficient_asr.utils.errors import UserError


def result(variant: str, wer: float | None, macs: float, cpu_s: float, **changes: object) -> Result:
    technique = "none" if variant == "baseline" else "downsampling"
    runtime = {
        "device": "cpu", "device_name": "toy", "threads": 2, "batch_size": 1, "lm": False, "runtime_s": cpu_s,
        "runtime_min_s": cpu_s, "runtime_max_s": cpu_s, "repeats": 3, "rtfx": 60 / cpu_s, "peak_memory_bytes": 1,
    }  # fmt: skip
    values = {
        "experiment": f"x_{variant}", "recipe": "r", "technique": technique, "variant": variant, "corpus": "toy",
        "split": "test", "benchmark_hash": "h1", "utterances": 10, "audio_s": 60.0, "reference_words": 100,
        "wer_percent": wer, "wer_ci95_percent": (wer - 1, wer + 1) if wer is not None else None, "cer_percent": 1.0,
        "substitutions": 1, "deletions": 1, "insertions": 1, "wer_lm_percent": None, "parameters": 5, "macs_g": macs,
        "macs_g_per_audio_s": macs, "macs_thop_g": None, "runtimes": [runtime],
    }  # fmt: skip
    return Result(**(values | changes))


def test_table_shows_ours_beside_the_paper_and_dashes() -> None:
    published = load_published(ROOT / "results" / "published")
    same = {"corpus": "librispeech", "split": "test-clean", "hparams": {"source": "microsoft/wavlm-large"}}
    ours = [result("baseline", 10, 4, 8, **same), result("signal x2", 12.3456, 2, 4, **same)]
    table = make_table("librispeech/test-clean", ours, published)
    row = next(line for line in table.splitlines() if "signal x2" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "downsampling signal x2" and cells[1] == "12.35 [11.3, 13.3]"
    assert cells[2] == "–" and cells[4] == "–"  # no LM, no thop: a dash, never a number
    assert cells[6] == "2.00×"
    assert cells[-4:] == ["4.85", "3.58", "193.0", "569"]
    assert "| baseline wavlm-large |" in table and "normaliser `plain`" in table
    for other in ({"split": "test-other"}, {"corpus": "fleurs"}, {"hparams": {"source": "openai/whisper-tiny"}}):
        assert "paper" not in make_table("x/y", [result("baseline", 10, 4, 8, **same | other)], published)
    assert "real speech" in table and "2303.06740" in table and "speeding_inferences" in table
    synthetic = make_table("toy/test", [result("baseline", 10, 4, 8, synthetic=True)], [])
    assert "**synthetic speech**" in synthetic and "paper" not in synthetic


def test_results_of_different_benchmarks_never_share_a_table() -> None:
    mixed = [result("baseline", 10, 4, 8), result("signal x2", 12, 2, 4, benchmark_hash="h2")]
    for call in (lambda: group_runs(mixed), lambda: make_table("t", mixed, []), lambda: check_comparable("t", mixed)):
        with pytest.raises(UserError, match="cannot share a table"):
            call()


def test_normalisers_have_tables_of_their_own() -> None:
    mixed = [result("baseline", 10, 4, 8), result("signal x2", 12, 2, 4, benchmark_hash="h2", normaliser="whisper")]
    assert {name: len(members) for name, members in group_runs(mixed).items()} == {
        "toy/test (plain)": 1, "toy/test (whisper)": 1,
    }  # fmt: skip
    translated = result("signal x2", 30, 2, 4, benchmark_hash="h3", details={"bleu": 20.0})
    assert [*group_runs([mixed[0], translated])] == ["toy/test (plain)", "toy/test (plain, translation)"]
    assert [*group_runs([translated])] == ["toy/test"]
    assert [*group_runs(mixed[:1])] == ["toy/test"] and plot_name("toy/test (plain)") == "toy_test_plain.png"


def test_pareto_front() -> None:
    points = [(4.0, 10.0), (2.0, 12.0), (3.0, 11.0), (3.5, 13.0), (2.0, 15.0), (5.0, 10.0)]
    assert pareto_front(points) == [1, 2, 0]


def test_plot_is_drawn(tmp_path: Path) -> None:
    path = plot("toy/test", [result("baseline", 10, 4, 8), result("signal x2", 12, 2, 4)], tmp_path / "plots" / "a.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10000
    picture = path.with_suffix(".svg").read_text()
    assert "signal x2" in picture and "12.00 %" in picture and path.with_suffix(".pdf").read_bytes()[:4] == b"%PDF"
    assert picture.count("GMACs per utterance") == 1 and "GPU" not in picture  # one panel for each measured cost
    again = plot("toy/test", [result("baseline", 10, 4, 8), result("signal x2", 12, 2, 4)], tmp_path / "b.png")
    assert again.with_suffix(".svg").read_text() == picture


def test_times_of_different_machines_never_share_an_axis(tmp_path: Path) -> None:
    rows = [result("baseline", 10, 4, 8), result("signal x2", 12, 2, 4), result("signal x3", 14, 1, 0.5)]
    rows[2].runtimes[0] |= {"device_name": "fast", "threads": 64}
    picture = plot("toy/test", rows, tmp_path / "a.png").with_suffix(".svg").read_text()
    assert "only rows timed on toy, 2 threads" in picture
    (macs, _), (seconds, cost) = _costs(rows)
    assert macs == "GMACs per utterance" and seconds.startswith("CPU seconds for the split, batch 1")
    assert [cost(row) for row in rows] == [8, 4, None]
    alike = plot("toy/test", rows[:2], tmp_path / "b.png").with_suffix(".svg").read_text()
    assert "only rows timed" not in alike


def test_many_rows_keep_their_numbers_in_all_panels(tmp_path: Path) -> None:
    rows = [result(f"signal x{i}", 10 + i, 30 - i, 40 - i) for i in range(25)]
    picture = (
        plot("toy/test", [result("baseline", 9, 40, 50), *rows], tmp_path / "a.png").with_suffix(".svg").read_text()
    )
    for number in range(1, 27):
        assert len(re.findall(rf">{number}</text>", picture)) >= 3  # two panels and the list


def test_render_fills_markers_and_refuses_unknown_ones() -> None:
    text = "a\n<!-- table toy/test -->\nold\n<!-- /table -->\nb\n"
    out = fill_markers(text, [result("baseline", 10, 4, 8)], [], ROOT / "results")
    assert "old" not in out and "10.00 [9.0, 11.0]" in out and out.startswith("a\n") and out.endswith("b\n")
    assert fill_markers(out, [result("baseline", 10, 4, 8)], [], ROOT / "results") == out
    with pytest.raises(UserError, match="'no/such' is requested"):
        fill_markers(text.replace("toy/test", "no/such"), [result("baseline", 10, 4, 8)], [], ROOT / "results")


def test_markers_name_a_normaliser_and_are_never_left_as_they_were() -> None:
    two = [result("baseline", 10, 4, 8), result("baseline", 5, 4, 8, benchmark_hash="h2", normaliser="whisper")]
    text = "<!-- table toy/test (whisper) -->\n<!-- /table -->\n"
    assert "5.00 [" in fill_markers(text, two, [], ROOT / "results")
    for broken, message in (
        ("<!-- table toy/test! -->\nold\n<!-- /table -->\n", "malformed"),
        ("<!-- table toy/test (whisper) clsr -->\n<!-- /table -->\n", "no results of clsr"),
    ):
        with pytest.raises(UserError, match=message):
            fill_markers(
                broken, [result("x", 5, 4, 8, benchmark_hash="h2", normaliser="whisper"), two[0]], [], ROOT / "results"
            )


def test_a_baseline_is_named_by_its_model() -> None:
    for source, name in (
        ("openai/whisper-tiny", "whisper-tiny"), ("efficient_asr:mini_encoder", "mini_encoder"),
        ("output/finetune_tiny/1986/model", "finetune_tiny"), ("/models/whisper-base/", "whisper-base"),
    ):  # fmt: skip
        assert result("baseline", 1, 1, 1, hparams={"source": source}).model_name == name
        assert f"| baseline {name} |" in make_table("t", [result("baseline", 1, 1, 1, hparams={"source": source})], [])


def test_a_marker_selects_techniques_and_exits_have_a_column() -> None:
    leaves = {"technique": "early_exit", "details": {"mean_exit_layer": 4.25, "exit_rule": "entropy"}}
    stacked = result("both", 12, 2, 4, technique="downsampling + early_exit")
    runs = [
        result("baseline", 10, 4, 8),
        result("signal x2", 12, 2, 4),
        result("entropy 0.1", 11, 3, 6, **leaves),
        stacked,
    ]
    out = fill_markers(
        "<!-- table toy/test early_exit downsampling+early_exit -->\n<!-- /table -->\n", runs, [], ROOT / "results"
    )
    assert "entropy 0.1 | 4.25 |" in out and "baseline | – |" in out and "both" in out and "signal" not in out
    assert fill_markers(out, runs, [], ROOT / "results") == out
    assert "mean exit layer" not in make_table("toy/test", runs[:2], [])


def test_published_numbers_name_their_source(tmp_path: Path) -> None:
    for row in load_published(ROOT / "results" / "published"):
        assert row.source and "arXiv" in row.paper and row.values
    (tmp_path / "x.json").write_text(json.dumps({"paper": "p", "setting": "s", "rows": [1]}))
    with pytest.raises(UserError, match="'source' is missing"):
        load_published(tmp_path)


def test_the_published_table_is_the_papers() -> None:
    rows = {row.name: row.values for row in load_published(ROOT / "results" / "published")}
    assert rows["CL3"] == {
        "wer_percent": 5.47, "gpu_s": 69, "cpu_s": 414, "wer_lm_percent": 4.12, "gpu_lm_s": 91, "cpu_lm_s": 436, "macs_g": 134.864
    }  # fmt: skip
    assert rows["Full"]["macs_g"] == 386.538 and rows["Entropy 0.06"]["mean_exit_layer"] == 13.8


def test_committed_tables_show_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/report.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_committed_results_are_complete() -> None:
    runs = load_runs(ROOT / "results" / "runs")
    assert runs
    for run in runs:
        rows = run.load_utterances()
        assert len(rows) == run.utterances
        assert sum(row["errors"] for row in rows) == run.substitutions + run.deletions + run.insertions
        assert run.wer_percent == pytest.approx(100 * sum(row["errors"] for row in rows) / run.reference_words)
        assert run.macs_g == pytest.approx(sum(row["macs_g"] for row in rows) / len(rows))
        assert run.synthetic == (run.corpus in ("mini", "mini-whisper"))  # the corpora of synthetic speech
        assert run.provenance["commit"] and run.provenance["versions"]["torch"]
