"""Every bad input ends with the right exit code and a sentence that helps, and docs/bad_inputs.md shows just that.

`PYTHONPATH=tests python tests/repository/test_bad_inputs.py` writes the page anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from bad_inputs import CASES, EVALUATE, SECTIONS, TRAIN, TRANSCRIBE, Case, World
from conftest import ROOT, TEXTS, make_corpus, write_tiny_yaml

from efficient_asr.commands import COMMANDS
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import exit_code

PAGE = ROOT / "docs" / "reference" / "bad_inputs.md"
QUICK = ["--device", "cpu", "--number_of_epochs", "1", "--measure_runtime", "False", "--measure_macs", "False"]


def script(name: str) -> object:
    """Return main() of a script, or of the command that it calls."""
    if Path(name).stem in COMMANDS:
        return importlib.import_module(f"efficient_asr.commands.{Path(name).stem}").main
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_world(root: Path) -> World:
    """Build what the cases spoil."""
    make_corpus(root / "corpus")
    write_tiny_yaml(root / "tiny.yaml", root / "corpus", root)
    torch.manual_seed(0)
    labels = CharacterLabels.from_texts(TEXTS)
    encoder = new_whisper_encoder(d_model=32, layers=1, heads=2)
    CTCModel(torch.nn.Identity(), encoder, CTCHead(32, len(labels), "none"), labels).save(root / "model")
    return World(root)


def arguments(case: Case, world: World, added: list[str]) -> list[str]:
    """The whole command line after the name of the command."""
    if case.command == TRAIN:
        quick = [] if "--number_of_epochs" in added else QUICK
        return [str(world.yaml), *quick, *added]
    if case.command == EVALUATE:
        out = [] if "--out" in added else ["--out", str(world.root / "r.json")]
        return [
            str(world.model),
            "--manifest",
            str(world.corpus / "test.jsonl"),
            "--repeats",
            "0",
            "--no_macs",
            *out,
            *added,
        ]
    return [str(world.model), *added] if case.command == TRANSCRIBE else added


def play(case: Case, root: Path) -> tuple[int, str]:
    """Feed the input; returns the exit code and what a person sees, without progress bars."""
    world = make_world(root)
    added = [x.replace("{model}", str(world.model)).replace("{root}", str(root)) for x in case.change(world)]
    argv, out, err = arguments(case, world, added), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        if case.command == TRAIN:
            code = run(CTCBrain, argv)
        else:
            patch.setattr(sys, "argv", [case.command, *argv])
            code = exit_code(script(case.command))
    text = err.getvalue() if code else out.getvalue()
    start = text.find("error: ") if code else text.find(next((x for x in text.splitlines() if case.shows in x), "\0"))
    text = text[max(0, start) :] if code else text[max(0, start) :].split("\n")[0]
    text = text.replace(str(root), "…").replace(str(ROOT), "efficient_asr")
    return code, re.sub(r"WER .*", "WER …", text).strip()


def row(case: Case, code: int, text: str) -> str:
    """One row of the page."""
    shown = text if len(text) < 420 else text[:400] + " […]"
    shown = shown.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
    return f"| {case.what} | `{case.command}` | {code} | {shown} |"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_bad_input_is_answered_as_the_page_says(case: Case, tmp_path: Path) -> None:
    if "language model" in case.what:
        pytest.importorskip("kenlm")
    if "adapter" in case.what:
        pytest.importorskip("peft")
    root = tmp_path / "w"
    root.mkdir()
    code, text = play(case, root)
    assert code == case.code, text
    assert case.shows in text and "Traceback" not in text
    assert row(case, code, text) in PAGE.read_text(encoding="utf-8"), (
        "run: PYTHONPATH=tests python tests/repository/test_bad_inputs.py"
    )


def test_the_page_has_no_other_rows_and_enough_of_them() -> None:
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "|---" not in line
    ]
    assert len(rows) - len(SECTIONS) == len(CASES) >= 60
    assert len({case.what for case in CASES}) == len(CASES)


def write_page() -> None:
    """Play all cases and write the page."""
    lines = [
        "# What you see when the input is bad",
        "",
        f"{len(CASES)} inputs, each fed by a test (`tests/repository/test_bad_inputs.py`, which also writes this "
        f"page) to the command "
        "next to it. `…` stands for a folder. Exit codes: 0 done, 2 a mistake that you can fix (a full disk too), 130 "
        "interrupted, 1 a bug of ours, with a traceback that we would like to see.",
        "",
        "Nothing is lost by a stop: what was prepared, checked, trained and scored is there when the command is started again. "
        "`--skip_bad True` leaves bad utterances out instead, counts them, and lists them with the reason in "
        "`<output_folder>/skipped_*.jsonl`. Audio that turns bad after it was checked stops the training, or is left out "
        "with `--skip_bad True`; in validation and evaluation it always stops the run, since a WER over fewer utterances would "
        "not compare. A loss or gradient that is not finite skips the step, names the utterances in `nonfinite.jsonl`, and stops "
        "the run when it happens more than `nonfinite_patience` times in an epoch.",
    ]
    for section, cases in SECTIONS.items():
        lines += ["", f"## {section}", "", "| what is fed | to | exit | what you see |", "|---|---|---|---|"]
        for case in cases:
            with TemporaryDirectory() as folder:
                lines.append(row(case, *play(case, Path(folder))))
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(CASES)} cases: {PAGE}")


if __name__ == "__main__":
    write_page()
