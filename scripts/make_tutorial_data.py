"""Make the recordings of docs/tutorial.md: a folder with audio and CSV files, a few rows of which are broken, as in real life.

python scripts/make_tutorial_data.py FOLDER

The speech is synthetic: unrelated words by the voices of the mini corpus.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import soundfile

from efficient_asr.corpora import mini
from efficient_asr.data import load_audio
from efficient_asr.utils.errors import UserError, exit_code

COLUMNS = ("path", "sentence")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("name one folder: python scripts/make_tutorial_data.py my_data")
    folder = Path(sys.argv[1])
    manifests = mini.prepare(None, folder, minutes=5.0, corpus_seed=5, sentences="words")
    for split, manifest in manifests.items():
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        cells = [(row["audio"], row["text"]) for row in rows]
        cells.insert(3, ("audio/lost.flac", "a recording that was deleted"))
        cells.insert(5, (cells[0][0], ""))  # nobody typed the text
        if split == "train":
            soundfile.write(folder / "audio" / "cut.wav", load_audio(folder / rows[0]["audio"]).numpy(), 16000)
            content = (folder / "audio" / "cut.wav").read_bytes()
            (folder / "audio" / "cut.wav").write_bytes(content[: len(content) // 2])
            cells.insert(7, ("audio/cut.wav", "the end of the file is missing"))
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *cells])
        manifest.unlink()
    calls = folder / "calls"
    calls.mkdir(exist_ok=True)
    agent, customer = (load_audio(folder / "audio" / f"test-0000{i}.flac").numpy() for i in (0, 1))
    pause = np.zeros(8000, dtype=np.float32)
    left, right = (
        np.concatenate([agent, pause, 0 * customer]),
        np.concatenate([0 * agent, pause, customer]),
    )
    soundfile.write(calls / "monday.wav", np.stack([left, right], axis=1), 16000)
    print(f"{folder}: train.csv, dev.csv, test.csv, and a two-party call in {calls}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
