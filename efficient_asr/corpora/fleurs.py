"""fleurs: the same sentences read in 102 languages (arXiv 2205.12446), for out-of-domain tests and for translation.

`data_folder` contains one folder per language in the official layout: `ca_es/train.tsv`, `dev.tsv` and `test.tsv`, without
header lines, and the audio in `ca_es/audio/<split>/` (`ca_es/<split>/` also works). With `download: True`, missing splits are
fetched from the hub with the package datasets, into the same layout.

A sentence has the same number in all languages. With `translations: True`, every utterance also gets its English text, from
`en_us`, in the field `translation`: the reference for `task: translate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import BROKEN, ORIGIN, Row, in_parallel, inspect_audio, table_rows, write_manifest
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.files import atomic_write

SPLITS = ("train", "dev", "test")
COLUMNS = ("id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender")
# Languages whose Whisper code differs from the first part of the folder name.
CODES = {"cmn_hans_cn": "zh", "fil_ph": "tl", "nb_no": "no", "jv_id": "jw", "ckb_iq": "ku"}
HUB, HUB_SPLITS = "google/fleurs", {"train": "train", "dev": "validation", "test": "test"}


def whisper_code(folder: str) -> str:
    """Return Whisper's code for a FLEURS language such as `ca_es`."""
    return CODES.get(folder, folder.partition("_")[0])


def _lines(source: Path) -> list[tuple[int, dict[str, str] | ValueError]]:
    """Return the number of each line of a tsv file with its fields, or with the error if the line is bad.

    Raises
    ------
    UserError
        If no line has the columns of FLEURS.
    """
    lines = list(table_rows(source, "\t", COLUMNS))
    if lines and all(isinstance(fields, ValueError) for _, fields in lines):
        number, problem = lines[0]
        raise UserError(f"{source}, line {number}: {problem}; is it a FLEURS file?")
    return lines


def _read_line(
    folder: Path, split: str, raw: bool, translations: dict[str, str], line: tuple[int, dict[str, str] | ValueError]
) -> Row:
    """Return the row of a line; a bad line becomes a row that holds the error."""
    number, fields = line
    origin = {ORIGIN: f"{folder / split}.tsv:{number}"}
    if isinstance(fields, ValueError):
        return {BROKEN: str(fields)} | origin
    name = Path(fields["file_name"]).name
    audio = next((a for a in (folder / "audio" / split / name, folder / split / name) if a.is_file()), None)
    if audio is None:
        return {BROKEN: f"no audio {name} in {folder / 'audio' / split} (unpack {split}.tar.gz there)"} | origin
    report = inspect_audio(str(audio), samples=False)
    if report.problem is not None:
        return {BROKEN: report.problem} | origin
    row = {
        "id": f"{folder.name}-{split}-{audio.stem}", "audio": str(audio.absolute()), "duration": report.duration_s,
        "text": fields["raw_transcription" if raw else "transcription"], "language": whisper_code(folder.name),
        "sentence": fields["id"], "gender": fields["gender"],
    }  # fmt: skip
    if fields["id"] in translations:
        row["translation"] = translations[fields["id"]]
    return row | origin


def from_hub(config: str, split: str) -> Iterable[dict[str, Any]]:
    """Return the utterances of a split, with the audio as the bytes of a file.

    Raises
    ------
    UserError
        If the package datasets is missing or the hub cannot be reached.
    """
    try:
        from datasets import Audio, load_dataset
    except ImportError:
        raise UserError(
            "corpus fleurs: download needs the package datasets: pip install 'efficient_asr[hub]'"
        ) from None
    try:
        files = f"{config}/{HUB_SPLITS[split]}/*.parquet"
        found = load_dataset(HUB, revision="refs/convert/parquet", data_files=files, split="train")
        return found.cast_column("audio", Audio(decode=False))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot fetch {HUB}, {config} ({str(error).splitlines()[0]})") from None


def download_split(folder: Path, split: str, fetch: Callable[[str, str], Iterable[dict[str, Any]]] = from_hub) -> None:
    """Download a split into the official layout; the tsv file is written last.

    Arguments
    ---------
    folder : Path
        Folder of one language; its name is the configuration on the hub.
    split : str
        `train`, `dev` or `test`.
    fetch : callable
        Takes the configuration and the split, and returns the utterances.
    """
    print(f"fetching {HUB}, {folder.name}, {split}")
    found = fetch(folder.name, split)
    (folder / "audio" / split).mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(folder / f"{split}.tsv") as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        for entry in tqdm(found, desc=f"{folder.name} {split}", unit="utt", leave=False):
            name = Path(entry["audio"]["path"] or f"{entry['id']}-{entry['num_samples']}.wav").name
            (folder / "audio" / split / name).write_bytes(entry["audio"]["bytes"])
            texts = [entry["raw_transcription"], entry["transcription"], ""]
            cells = [entry["id"], name, *texts, entry["num_samples"], entry["gender"]]
            file.write("\t".join(" ".join(str(cell).split()) for cell in cells) + "\n")


def prepare(
    data_folder: str | None,
    out_folder: Path,
    languages: list[str] | None = None,
    splits: list[str] | None = None,
    raw: bool = False,
    translations: bool = False,
    download: bool = False,
) -> dict[str, Path]:
    """Write one manifest per split for all languages, and one per split and language (`test_ca_es`).

    Arguments
    ---------
    data_folder : str
        Contains one folder per language.
    out_folder : Path
        Output folder for the manifests.
    languages : list of str, optional
        Folder names such as ca_es; None for all that exist.
    splits : list of str, optional
        Any of train, dev, test; None for those that exist (with `download`, all).
    raw : bool
        Use the text with case and punctuation.
    translations : bool
        Add the English text to every utterance that has one. It keeps case and punctuation, because BLEU compares it with the
        unnormalised output of the model.
    download : bool
        Fetch missing splits.

    Raises
    ------
    UserError
        If folders or files are missing, or a file has other columns. Missing and damaged audio is reported, or skipped, when
        the manifest is read.
    """
    root = Path(data_folder or "")
    if not data_folder or (not root.is_dir() and not download):
        raise UserError(
            f"data_folder: '{data_folder}' is not a folder; give the one that contains ca_es and the other languages"
        )
    there = sorted(path.parent.name for path in root.glob("*/*.tsv")) if root.is_dir() else []
    wanted = [languages] if isinstance(languages, str) else list(languages or dict.fromkeys(there))
    for split in splits or ():
        if split not in SPLITS:
            raise UserError(
                f"corpus_options: no split '{split}' in FLEURS; choose from {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
    english = {}
    for split in (splits or SPLITS) if translations else ():
        if _at_hand(root / "en_us", split, download):
            lines = _lines(root / "en_us" / f"{split}.tsv")
            english |= {f["id"]: f["raw_transcription"] for _, f in lines if not isinstance(f, ValueError)}
    if translations and not english:
        raise UserError(
            f"corpus_options: translations come from {root / 'en_us'}, which does not exist; "
            "the corpus option download: True fetches it"
        )
    found: dict[str, list[Row]] = {}
    for language in wanted:
        folder = root / language
        at_hand = [split for split in splits or SPLITS if _at_hand(folder, split, download)]
        missing = [split for split in splits or () if split not in at_hand]
        if missing or not at_hand:
            raise UserError(
                f"data_folder: {folder} has no {(missing or SPLITS)[0]}.tsv.{did_you_mean(language, there)}"
            )
        for split in at_hand:
            lines = list(_lines(folder / f"{split}.tsv"))
            read = functools.partial(_read_line, folder, split, raw, english)
            rows = list(
                tqdm(
                    in_parallel(read, lines, len(lines) > 500), total=len(lines), desc=language, unit="utt", leave=False
                )
            )
            found.setdefault(split, []).extend(rows)
            found[f"{split}_{language}"] = rows
    if not found:
        raise UserError(f"data_folder: {root} contains no FLEURS language, such as ca_es with a test.tsv")
    return {name: write_manifest(Path(out_folder) / f"{name}.jsonl", iter(rows)) for name, rows in found.items()}


def _at_hand(folder: Path, split: str, download: bool) -> bool:
    """Return whether a split exists, after downloading it if requested."""
    path = folder / f"{split}.tsv"
    if not path.is_file() and download:
        download_split(folder, split)
    return path.is_file()
