"""Trainings in processes of their own, which a test may kill, interrupt or starve."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import ROOT, make_corpus, write_tiny_yaml

OPTIONS = [
    "--device", "cpu", "--measure_runtime", "False", "--number_of_epochs", "3", "--batch_size", "1", "--ckpt_interval_minutes",
    "0", "--ckpt_interval_steps", "1", "--speeds_percent", "[90, 100, 110]",
]  # fmt: skip


# Processes start from one that has imported everything and used no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "efficient_asr.training.run",
        "efficient_asr.training.brain",
        "efficient_asr.models.encoders.whisper",
        "efficient_asr.training.whisper",
        "efficient_asr.inference.load",
        "efficient_asr.techniques.decider.data",
    ]
)


def make_yaml(base: Path) -> Path:
    """Write a corpus and the YAML of a tiny training with dropout."""
    yaml = write_tiny_yaml(base / "tiny.yaml", make_corpus(base / "corpus"), base)
    yaml.write_text(yaml.read_text().replace("dropout: 0.0", "dropout: 0.3"))
    return yaml


def _train(yaml: Path, folder: Path, prepare: Callable[[], None] | None, options: list[str]) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "console.txt", "a") as console:
        os.dup2(console.fileno(), 1)
        os.dup2(console.fileno(), 2)
    torch.set_num_threads(1)
    from efficient_asr.training.ctc import CTCBrain
    from efficient_asr.training.run import run

    if prepare is not None:
        prepare()
    folders = ["--output_folder", f"{folder}/output", "--results_folder", f"{folder}/results"]
    sys.exit(run(CTCBrain, [str(yaml), *folders, *options]))


def begin(
    yaml: Path, folder: Path, prepare: Callable[[], None] | None = None, options: list[str] = OPTIONS
) -> multiprocessing.Process:
    """Start a training; `prepare` is called in its process first."""
    process = CONTEXT.Process(target=_train, args=(yaml, folder, prepare, options))
    process.start()
    return process


def train(
    yaml: Path, folder: Path, prepare: Callable[[], None] | None = None, options: list[str] = OPTIONS
) -> tuple[int, str]:
    """Train to the end; returns the exit code (-9 for one that was killed) and what was printed."""
    before = (folder / "console.txt").stat().st_size if (folder / "console.txt").is_file() else 0
    process = begin(yaml, folder, prepare, options)
    process.join(120)
    return process.exitcode, (folder / "console.txt").read_bytes()[before:].decode()


def _play(script: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for name, stream in (("out", 1), ("err", 2)):
        with open(f"{folder}/{name}", "w") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = [script, *arguments]
    sys.path[0] = str((ROOT / script).parent)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script or recipe from the project's folder, in a process that does not have to import everything first."""
    with tempfile.TemporaryDirectory() as folder:
        given = [str(argument) for argument in arguments]
        process = CONTEXT.Process(target=_play, args=(script, given, dict(os.environ), folder))
        process.start()
        process.join(600)
        process.kill()
        process.join()
        said = [Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    return subprocess.CompletedProcess([script, *given], process.exitcode, *said)


def torchrun(script: list[str], folder: Path, yaml: Path, *options: str) -> subprocess.CompletedProcess:
    """Train in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *script, str(yaml), "--device=cpu",
        "--output_folder", str(folder / "output"), "--results_folder", str(folder / "results"), "--batch_size", "1",
        "--measure_runtime", "False", "--ckpt_interval_minutes", "0", "--ckpt_interval_steps", "1", *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env=environment)
