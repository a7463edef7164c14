"""librispeech: the official folder layout, `<split>/<speaker>/<chapter>/<speaker>-<chapter>-<nnnn>.flac` and `.trans.txt`.

Splits are the folders that are there: train-clean-100, train-clean-360, train-other-500, dev-clean, dev-other, test-clean,
test-other; and `train-10h`, the 10 hours of `train-clean-100` whose utterances come first in a fixed shuffle (its seed is in
this file), for the low-resource experiments of arXiv 2303.06740.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
from tqdm import tqdm

from efficient_asr.data import Row, write_manifest
from efficient_asr.errors import UserError

SPLITS = (
    "train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other",
)  # fmt: skip
SUBSET_HOURS = 10.0
SUBSET_SEED = 1986


def _read_chapter(transcript: Path) -> list[Row]:
    """Read one chapter's `.trans.txt` and the durations of its files."""
    rows = []
    for number, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, text = line.partition(" ")
        audio = transcript.with_name(f"{name}.flac")
        if not name or not text.strip():
            raise UserError(f"{transcript}, line {number}: an id and a text were expected, found '{line[:60]}'")
        if not audio.is_file():
            raise UserError(f"{transcript}, line {number}: {audio.name} is missing; is the split unpacked completely?")
        try:
            info = soundfile.info(str(audio))
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise UserError(f"cannot decode {audio} ({str(error).strip()}); copy it again") from None
        rows.append(
            {"id": name, "audio": str(audio.absolute()), "duration": info.frames / info.samplerate, "text": text.strip(),
             "language": "en", "speaker": name.split("-")[0]}
        )  # fmt: skip
    return rows


def ten_hours(rows: list[Row], hours: float = SUBSET_HOURS) -> list[Row]:
    """Return the first `hours` of a fixed shuffle, in the original order."""
    order = sorted(row["id"] for row in rows)
    random.Random(SUBSET_SEED).shuffle(order)
    duration = {row["id"]: row["duration"] for row in rows}
    chosen, total_s = set(), 0.0
    for name in order:
        if total_s >= hours * 3600:
            break
        chosen.add(name)
        total_s += duration[name]
    return [row for row in rows if row["id"] in chosen]


def prepare(data_folder: str | None, out_folder: Path) -> dict[str, Path]:
    """Write one manifest for every split folder that is there.

    Arguments
    ---------
    data_folder : str
        Folder of the splits (official name: LibriSpeech).
    out_folder : Path
        Gets `<split>.jsonl`; a manifest that is already there is kept, so an interrupted run goes on.

    Raises
    ------
    UserError
        Where the folder holds no split, or a chapter is incomplete.
    """
    if not data_folder or not Path(data_folder).is_dir():
        raise UserError(
            f"data_folder: '{data_folder}' is no folder; name the one that holds train-clean-100 and the others"
        )
    root, out_folder = Path(data_folder), Path(out_folder)
    found = [split for split in SPLITS if (root / split).is_dir()]
    if not found:
        raise UserError(f"data_folder: {root} holds none of {', '.join(SPLITS)}")
    origin = out_folder / "data_folder.txt"
    if not origin.is_file() or origin.read_text() != str(root.resolve()):  # manifests of another place do not count
        for split in (*SPLITS, "train-10h"):
            (out_folder / f"{split}.jsonl").unlink(missing_ok=True)
        out_folder.mkdir(parents=True, exist_ok=True)
        origin.write_text(str(root.resolve()))
    manifests = {}
    for split in found:
        manifests[split] = out_folder / f"{split}.jsonl"
        if manifests[split].is_file():
            continue
        transcripts = sorted((root / split).glob("*/*/*.trans.txt"))
        if not transcripts:
            raise UserError(f"{root / split} holds no <speaker>/<chapter>/*.trans.txt")
        with ThreadPoolExecutor() as pool:  # reading headers waits for the disk
            chapters = list(
                tqdm(pool.map(_read_chapter, transcripts), total=len(transcripts), desc=split, unit="chapter")
            )
        rows = [row for chapter in chapters for row in chapter]
        write_manifest(manifests[split], rows)
        if split == "train-clean-100":
            write_manifest(out_folder / "train-10h.jsonl", ten_hours(rows))
    if "train-clean-100" in manifests:
        manifests["train-10h"] = out_folder / "train-10h.jsonl"
    return manifests
