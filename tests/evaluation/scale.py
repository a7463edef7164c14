"""What only large numbers show: memory, opening times, preparation, throughput. Run by hand; it prints JSON lines.

    python tests/evaluation/scale.py manifest 1000000      # open a manifest of so many lines
    python tests/evaluation/scale.py evaluation 100 10000  # peak memory of evaluations of so many utterances
    python tests/evaluation/scale.py librispeech 281241  # prepare a tree of so many tiny files
    python tests/evaluation/scale.py training hparams/mini/finetune_ctc.yaml --num_workers 1   # throughput of 1 and 2 processes

The numbers that were found stand in docs/scale.md.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile

ROOT = Path(__file__).parents[2]


def show(**entry: object) -> None:
    print(json.dumps(entry), flush=True)


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def write_manifest(folder: Path, count: int, files: int = 5000) -> Path:
    """Write a manifest of `count` lines over `files` different audio files, whose lengths are spread over any part of it."""
    rng = np.random.default_rng(0)
    extra_ms = [2017 * i % files for i in range(files)]
    for i in range(files):
        samples = 0.1 * rng.standard_normal(8000 + 16 * extra_ms[i])
        soundfile.write(folder / f"{i}.flac", samples, 16000)
    with open(folder / "test.jsonl", "w") as file:
        for i in range(count):
            duration = 0.5 + 0.001 * extra_ms[i % files]
            row = {"id": f"utterance-{i:07d}", "audio": f"{i % files}.flac", "duration": duration}
            file.write(json.dumps({**row, "text": f"this is the text of number {i}", "language": "en"}) + "\n")
    return folder / "test.jsonl"


def manifest(count: int) -> None:
    from efficient_asr.data import read_manifest

    with TemporaryDirectory() as folder:
        path = write_manifest(Path(folder), count)
        before = peak_mb()
        for check in ("header", "samples"):
            started = time.perf_counter()
            rows = read_manifest(path, check_audio=check)
            seconds = time.perf_counter() - started
            assert len(rows) == count and rows[count - 1]["id"] == f"utterance-{count - 1:07d}"
            show(
                what="manifest",
                lines=count,
                check=check,
                seconds=round(seconds, 1),
                peak_mb=peak_mb(),
                imports_mb=before,
            )


def evaluation(*counts: int) -> None:
    """Each in a process of its own, since a process's peak never falls."""
    code = """
import sys; sys.path.insert(0, "tests")
import scale, torch
from pathlib import Path
from tempfile import TemporaryDirectory
from efficient_asr.evaluation.evaluator import Benchmark, evaluate
from efficient_asr.evaluation.transcriber import CTCTranscriber
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.whisper import new_whisper_encoder
from efficient_asr.text import CharacterLabels
torch.manual_seed(0)
labels = CharacterLabels.from_texts(["abcdefghijklmnopqrstuvwxyz"])
encoder = new_whisper_encoder(d_model=32, layers=2, heads=2)
model = CTCModel(torch.nn.Identity(), encoder, CTCHead(32, len(labels), "none"), labels)
with TemporaryDirectory() as folder:
    count = int(sys.argv[1])
    path = scale.write_manifest(Path(folder), count)
    before = scale.peak_mb()
    started = scale.time.perf_counter()
    result = evaluate(CTCTranscriber(model), Benchmark.from_manifest(path), repeats=1)
    result.save(Path(folder) / "x.json")
    scale.show(what="evaluation", utterances=result.utterances, seconds=round(scale.time.perf_counter() - started, 1),
               peak_mb=scale.peak_mb(), before_mb=before)
"""
    for count in counts:
        subprocess.run([sys.executable, "-c", code, str(count)], check=True, cwd=ROOT)


def librispeech(count: int) -> None:
    """A tree like LibriSpeech's 960 hours: about 51 utterances a chapter; the files are hard links to a few tiny ones."""
    with TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for i in range(50):
            soundfile.write(folder / f"{i}.flac", 0.1 * rng.standard_normal(1600 + 16 * i), 16000)
        for start in range(0, count, 51):
            chapter = start // 51
            split = ("train-clean-100", "train-clean-360", "train-other-500")[0 if start < 28539 else 1 + (chapter % 2)]
            place = folder / "LibriSpeech" / split / str(100 + chapter // 3) / str(chapter)
            place.mkdir(parents=True)
            names = [f"{100 + chapter // 3}-{chapter}-{i:04d}" for i in range(min(51, count - start))]
            for i, utterance in enumerate(names):
                os.link(folder / f"{i % 50}.flac", place / f"{utterance}.flac")
            text = "".join(f"{utterance} SOME WORDS THAT WERE SAID\n" for utterance in names)
            (place / f"{100 + chapter // 3}-{chapter}.trans.txt").write_text(text)
        show(what="librispeech", step="tree made", utterances=count)
        code = (
            "import sys; from efficient_asr.corpora import librispeech; from pathlib import Path;"
            "print(sum(sum(1 for _ in open(p)) for s, p in librispeech.prepare(sys.argv[1], Path(sys.argv[2])).items()"
            " if s != 'train-10h'))"
        )
        command = [sys.executable, "-c", code, str(folder / "LibriSpeech"), str(folder / "out")]
        started = time.perf_counter()
        first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while not (folder / "out" / "train-clean-360.jsonl").exists() and first.poll() is None:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        show(what="librispeech", step="killed after two splits began", seconds=round(time.perf_counter() - started, 1))
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        show(what="librispeech", step="resumed", seconds=round(time.perf_counter() - started, 1), rows=int(done.stdout))
        started = time.perf_counter()
        subprocess.run([*command[:-1], str(folder / "again")], cwd=ROOT, check=True, capture_output=True)
        show(what="librispeech", step="from nothing", seconds=round(time.perf_counter() - started, 1))
        from efficient_asr.data import read_manifest

        for split in ("train-clean-360",):
            started = time.perf_counter()
            rows = read_manifest(
                folder / "again" / f"{split}.jsonl", check_audio="samples", cache=folder / "cache.json"
            )
            seconds = round(time.perf_counter() - started, 1)
            show(what="librispeech", step=f"{split}: every file decoded", utterances=len(rows), seconds=seconds)
            started = time.perf_counter()
            read_manifest(folder / "again" / f"{split}.jsonl", check_audio="samples", cache=folder / "cache.json")
            show(
                what="librispeech", step=f"{split}: again, remembered", seconds=round(time.perf_counter() - started, 1)
            )


def training(yaml: str, *options: str) -> None:
    """Train an epoch with 1 and with 2 processes; `throughput.jsonl` of each run is shown."""
    for processes in (1, 2):
        with TemporaryDirectory() as folder:
            launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [
                sys.executable, *launch, "recipes/finetune_ctc/train.py", yaml, "--device=cpu", "--output_folder", folder,
                "--results_folder", folder, "--measure_runtime", "False", "--number_of_epochs", "1", *options,
            ]  # fmt: skip
            threads = str(max(1, (os.cpu_count() or 2) // processes))
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=environment)
            for line in (Path(folder) / "throughput.jsonl").read_text().splitlines():
                show(
                    what="training", yaml=yaml, threads_each=int(threads), options=" ".join(options), **json.loads(line)
                )


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    globals()[kind](*(rest if kind == "training" else map(int, rest)))
