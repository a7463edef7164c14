"""The quickstart, run by scripts/quickstart.sh: one model of each kind on the synthetic mini corpus, evaluated in the same way.

A CTC baseline, the same with half the audio frames, the same with early exit, and two tiny Whispers of which a decider chooses
one for each utterance. Models are trained two at a time, each with half of the cores; afterwards they are timed one by one.
All processes are forked from one that has imported everything. Rerun the command to resume; finished steps are
skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = Path("output/quickstart")
DATA, LABELS, LOGS, RUNS = (OUT / name for name in ("data", "labels", "logs", "runs"))
TRAINED_ON = 120  # utterances on which the two Whispers are compared to train the decider
SMALL, LARGE = "efficient_asr:mini_whisper_small", "efficient_asr:mini_whisper_large"
WHISPER = [
    "--corpus",
    "jsonl",
    "--corpus_name",
    "mini-whisper",
    "--data_folder",
    str(DATA),
    "--prepared_folder",
    str(DATA / "prepared"),
]
# Name: recipe, YAML file, options. The order is that of the training, longest first.
MODELS: dict[str, tuple[str, str, list[str]]] = {
    "quick_early_exit": ("early_exit", "mini/early_exit", ["--number_of_epochs", "1", "--lm_path", "null"]),
    "quick_decider": ("decider", "mini/decider", ["--labels_folder", str(LABELS), "--states_folder", "null", *WHISPER]),
    "quick_downsampling": ("downsampling", "mini/quick_downsampling", []),
    "quick_baseline": ("finetune_ctc", "mini/finetune_ctc", ["--number_of_epochs", "1", "--lm_path", "null"]),
}
WHISPERS = {
    f"quick_whisper_{size}": ("finetune_whisper", "mini/whisper", ["--whisper", size, "--test_only", "True", *WHISPER])
    for size in ("small", "large")
}  # fmt: skip
# CUDA does not survive a fork: while the modules are imported, torch must not ask the driver whether there is a GPU.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "efficient_asr.training.run",
        "efficient_asr.training.ctc",
        "efficient_asr.training.whisper",
        "efficient_asr.techniques.decider",
    ]
)
STARTED = time.monotonic()


def say(text: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


def play(script: str, argv: list[str], threads: int, log: str) -> None:
    """Run a script in this process, or synthesise the corpus if it is empty, with the output in a file."""
    import torch

    torch.set_num_threads(threads)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if not script:
        from efficient_asr.corpora import mini

        mini.prepare(None, Path("data/mini"))
        return
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def run(name: str, script: str, argv: list[str], threads: int) -> None:
    """Call `play` in a process of its own; on failure, exit and show the end of its output."""
    log = LOGS / f"{name}.log"
    process = CONTEXT.Process(target=play, args=(script, argv, threads, str(log)))
    process.start()
    process.join()
    if process.exitcode:
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        raise SystemExit("\n".join([*lines[-12:], f"error: {name} failed; its whole output: {log}"]))


def train_and_score(name: str, threads: int) -> None:
    """Train a model (the Whispers are evaluated as they are), and count its errors and MACs."""
    recipe, yaml, options = (MODELS | WHISPERS)[name]
    folders = ["--experiment", name, "--output_folder", str(OUT / name), "--results_folder", str(RUNS)]
    argv = [f"hparams/{yaml}.yaml", *options, *folders, "--measure_runtime", "False"]
    run(name, f"recipes/{recipe}/train.py", argv, threads)


def add_runtimes(name: str, threads: int) -> None:
    """Measure the runtimes of a model and add them to its result."""
    model = str(OUT / name / "model") if name in MODELS else f"efficient_asr:mini_{name.removeprefix('quick_')}"
    language = ["--language", "en"] if name in WHISPERS or name == "quick_decider" else []
    argv = [
        "time",
        model,
        str(RUNS / f"{name}.json"),
        "--manifest",
        "data/mini/test.jsonl",
        "--repeats",
        "1",
        *language,
    ]
    run(f"time_{name}", "efficient_asr/__main__.py", argv, threads)


def state_of(name: str) -> str:
    """Return `missing`, `scored` or `done`."""
    path = RUNS / f"{name}.json"
    if not path.is_file():
        return "missing"
    return "done" if json.loads(path.read_text(encoding="utf-8"))["runtimes"] else "scored"


def prepare_manifests() -> None:
    """Write the manifests for the Whispers: the mini corpus, with only the beginning of its training split."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in Path(f"data/mini/{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = rows[:TRAINED_ON] if split == "train" else rows
        lines = (json.dumps(row | {"audio": str(Path("data/mini").resolve() / row["audio"])}) for row in rows)
        (DATA / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def label(threads: int) -> None:
    """Transcribe the decider's training and validation data with both Whispers."""
    for size, model in (("small", SMALL), ("large", LARGE)):
        for split in ("train", "dev"):
            out = LABELS / f"{size}-{split}.jsonl"
            options = [
                "--manifest",
                str(DATA / f"{split}.jsonl"),
                "--out",
                str(out),
                "--normaliser",
                "plain",
                "--language",
                "en",
            ]
            run(f"label_{size}_{split}", "recipes/decider/label.py", [model, *options], threads)


def main() -> None:
    """Run everything that is not done yet."""
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.chdir(ROOT)
    for folder in (LOGS, RUNS):
        folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = [*MODELS, *WHISPERS]
    missing = [name for name in names if state_of(name) == "missing"]
    say(f"{len(missing)} of {len(names)} models to train: about 3 minutes on 2 cores; output in {LOGS}")
    if missing:
        run("corpus", "", [], cores)
        prepare_manifests()
        say("corpus: data/mini (20 minutes of synthetic speech)")

    def work(name: str) -> None:
        threads = max(1, cores // 2)
        if name == "quick_decider":
            label(threads)
        train_and_score(name, threads)
        say(f"trained and scored: {name}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, missing))
    for name in names:
        if state_of(name) == "scored":
            add_runtimes(name, cores)
            say(f"timed: {name}")
    run("report", "scripts/report.py", ["--runs", str(RUNS)], cores)
    print((LOGS / "report.log").read_text(encoding="utf-8"))
    model, audio = OUT / "quick_baseline" / "model", "data/mini/audio/test-00000.flac"
    say(f"done. Results: {RUNS}. To try a model: {shlex.quote(sys.executable)} scripts/transcribe.py {model} {audio}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            main()
        except KeyboardInterrupt:
            sys.exit("interrupted; rerun the command to resume")
