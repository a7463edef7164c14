"""librispeech: the official folder layout, `<split>/<speaker>/<chapter>/<speaker>-<chapter>-<nnnn>.flac` and `.trans.txt`.

The splits are the folders that exist: train-clean-100, train-clean-360, train-other-500, dev-clean, dev-other, test-clean and
test-other. `train-10h` is added for the low-resource experiments of arXiv 2303.06740: the first 10 hours of `train-clean-100`
in a fixed shuffle, whose seed is in this file.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tqdm import tqdm

from efficient_asr.data import BROKEN, ORIGIN, Row, in_parallel, inspect_audio, write_manifest
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import LineStore, read_complete_lines

SPLITS = (
    "train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other",
)  # fmt: skip
SUBSET_HOURS = 10.0
SUBSET_SEED = 1986


def read_chapter(transcript: Path) -> list[Row]:
    """Read one chapter's `.trans.txt` and the durations of its files; a bad line becomes a row that holds the error."""
    rows = []
    for number, line in enumerate(transcript.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        origin = f"{transcript}:{number}"
        name, _, text = line.decode("utf-8", errors="replace").partition(" ")
        audio = transcript.with_name(f"{name}.flac")
        if not name or "/" in name or "\0" in name or not text.strip() or "\ufffd" in text:
            rows.append({BROKEN: f"expected an id and a text, got '{line[:60]!r}'", ORIGIN: origin})
            continue
        report = inspect_audio(str(audio), samples=False)
        if report.problem is not None:
            rows.append({BROKEN: report.problem, ORIGIN: origin})
            continue
        rows.append(
            {"id": name, "audio": str(audio.absolute()), "duration": report.duration_s, "text": text.strip(),
             "language": "en", "speaker": name.split("-")[0], ORIGIN: origin}
        )  # fmt: skip
    return rows


def _read_split(folder: Path, manifest: Path) -> None:
    """Write the manifest of a split.

    Chapters are read in parallel and recorded in a progress file, from which an interrupted run resumes.
    """
    transcripts = sorted(folder.glob("*/*/*.trans.txt"))
    if not transcripts:
        raise UserError(f"{folder} contains no <speaker>/<chapter>/*.trans.txt")
    progress_file = manifest.with_name(manifest.name + ".progress")
    done = itertools.count()

    def same(chapter: list, start: int, size: int) -> bool:
        return chapter[0] == str(transcripts[next(done)])

    with LineStore(progress_file, "chapters", same) as lines:
        left = transcripts[lines.count :]
        chapters = in_parallel(read_chapter, left, len(left) > 50)
        progress = tqdm(chapters, total=len(transcripts), initial=lines.count, desc=folder.name, unit="chapter")
        for transcript, rows in zip(left, progress, strict=True):
            lines.append([str(transcript), rows])
    chapters = (content for content, start, _ in read_complete_lines(progress_file) if start)
    write_manifest(manifest, (row for _, rows in chapters for row in rows))
    _chapters_file(manifest).write_text(str(len(transcripts)))
    progress_file.unlink()


def _chapters_file(manifest: Path) -> Path:
    """Return the file that stores the number of chapters in a manifest."""
    return manifest.with_suffix(".chapters")


def _is_complete(folder: Path, manifest: Path) -> bool:
    """Return whether a manifest contains all chapters, even those unpacked since it was written, and no broken lines."""
    if not manifest.is_file() or not _chapters_file(manifest).is_file():
        return False
    chapters = sum(1 for _ in folder.glob("*/*/*.trans.txt"))
    if _chapters_file(manifest).read_text() != str(chapters):
        return False
    return BROKEN not in manifest.read_text(encoding="utf-8")  # broken files may have been repaired since


def ten_hours(rows: list[Row], hours: float = SUBSET_HOURS) -> list[Row]:
    """Return the first `hours` of speech in a fixed shuffle, in the original order."""
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
    """Write one manifest for every split folder that exists.

    Arguments
    ---------
    data_folder : str
        Folder that contains the splits (official name: LibriSpeech).
    out_folder : Path
        Output folder for `<split>.jsonl`. Completed chapters are kept, so an interrupted run resumes.

    Raises
    ------
    UserError
        If the folder contains no split. Missing and damaged files are reported, or skipped, when the manifest is read.
    """
    if not data_folder or not Path(data_folder).is_dir():
        raise UserError(
            f"data_folder: '{data_folder}' is not a folder; give the one that contains train-clean-100 and the other splits"
        )
    root, out_folder = Path(data_folder), Path(out_folder)
    found = [split for split in SPLITS if (root / split).is_dir()]
    if not found:
        raise UserError(f"data_folder: {root} contains none of {', '.join(SPLITS)}")
    origin = out_folder / "data_folder.txt"
    if not origin.is_file() or origin.read_text() != str(root.resolve()):  # discard manifests made from another folder
        for split in (*SPLITS, "train-10h"):
            for ending in ("jsonl", "jsonl.progress", "chapters"):
                (out_folder / f"{split}.{ending}").unlink(missing_ok=True)
        out_folder.mkdir(parents=True, exist_ok=True)
        origin.write_text(str(root.resolve()))
    manifests = {}
    for split in found:
        manifests[split] = out_folder / f"{split}.jsonl"
        if _is_complete(root / split, manifests[split]):
            continue
        _read_split(root / split, manifests[split])
        if split == "train-clean-100":
            (out_folder / "train-10h.jsonl").unlink(missing_ok=True)
    if "train-clean-100" in manifests:
        manifests["train-10h"] = out_folder / "train-10h.jsonl"
        if not manifests["train-10h"].is_file():
            with open(manifests["train-clean-100"], encoding="utf-8") as file:
                rows = [row for row in map(json.loads, file) if BROKEN not in row]
            write_manifest(manifests["train-10h"], ten_hours(rows))
    return manifests
