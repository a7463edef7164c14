"""common_voice: the official folder of one language: `clips/*.mp3` and `train.tsv`, `dev.tsv`, `test.tsv`, of any release.

Texts are cleaned by the rules of SpeechBrain's recipe (common_voice_prepare.py), which the papers used: Unicode composed;
in the languages below only letters, digits and apostrophes stay, in upper case; without accents if asked for; and sentences
of fewer than three words (characters, where words are not written apart) are left out. `cleaning: none` keeps texts as they
are.

Subsets as in arXiv 2311.01070: with `max_train` and `max_valid` the utterances with the most up votes, and of those the
fewest down votes, are taken (3000, 10000 or 28000 for training, 500 or 1000 for validation). Which ones they are is written
to `ids.json`, in the layout of the published files, `{language: {"train": [...], "validation": [...]}}` with rows of the tsv
files counted from 0; `ids_file` reads such a file. With `languages`, `data_folder` holds a folder for each.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import BROKEN, ORIGIN, Row, in_parallel, inspect_audio, table_rows, write_manifest
from efficient_asr.text.normalise import upper
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.files import atomic_write_text

SPLITS = ("train", "dev", "test")
LATIN = "A-Za-z0-9À-ÖØ-öø-ÿЀ-ӿ"
_KEPT = {  # what stays in a text; other languages keep everything but punctuation
    "en": LATIN + "’'", "fr": LATIN + "’'œŒ", "it": LATIN + "’'", "rw": LATIN + "’'",
    "ga-IE": "-A-Za-z'ÁÉÍÓÚáéíóú", "de": LATIN + "ẞ", "es": "A-Za-z0-9ÁÉÍÑÓÚÜáéíñóúü",
    "ar": "\u0621-\u063a\u0641-\u064a\u0660-\u0669", "fa": "\u0621-\u064a\u067e\u0686\u0698\u06a9\u06af\u06cc\u06f0-\u06f9",
}  # fmt: skip
_UNSPACED = ("ja", "zh-CN", "zh-TW", "zh-HK", "yue", "th", "lo", "km", "my")
CLEANINGS = ("speechbrain", "none")
_ID_SPLITS = {"train": "train", "dev": "validation"}  # names in files of ids


def clean(text: str, language: str, accented_letters: bool = True) -> str:
    """Clean a sentence; see the module."""
    text = unicodedata.normalize("NFC", text)
    if language in ("ar", "fa"):  # vowel marks and joiners stand inside words
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
    kept = _KEPT.get(language)
    if kept:
        text = re.sub(f"[^{kept}]+", " ", text)
    else:
        text = "".join(" " if unicodedata.category(c)[0] in "PS" and c not in "’'" else c for c in text)
    if language == "ga-IE":
        return " ".join(map(_irish, text.split()))
    text = upper(text.replace("ß", "ẞ"), language).replace("ẞ", "ß")  # upper case would make it two letters
    if language == "fr":  # articles stand alone
        text = re.sub("['’]", "' ", text)
    if not accented_letters:
        letters = unicodedata.normalize("NFD", text)
        text = "".join(c for c in letters if unicodedata.category(c) != "Mn").replace("'", " ").replace("’", " ")
    return " ".join(text.split())


def _irish(word: str) -> str:
    """Lower case; a prefixed t or n stays apart from the capital that it stands before (`tAthair`, `t-athair`)."""
    prefixed = len(word) > 1 and word[0] in "tn" and word[1] in "AEIOUÁÉÍÓÚ"
    return f"{word[0]}-{word[1:].lower()}" if prefixed else word.lower()


def _too_short(text: str, language: str) -> bool:
    return len(text.replace(" ", "") if language in _UNSPACED else text.split()) < 3


def _read_line(
    clips: Path, line: tuple[int, dict[str, str] | ValueError], origin: str, **options: object
) -> Row | None:
    """Read one line of a tsv file; None for a sentence that is too short, and what is wrong becomes a row that says so."""
    number, fields = line
    if isinstance(fields, ValueError):
        return {BROKEN: str(fields), ORIGIN: f"{origin}:{number}"}
    name, text, language = fields.get("path") or "", fields.get("sentence") or "", options["language"]
    if not name or not text.strip() or "/" in name or "\0" in name:
        return {BROKEN: "a path and a sentence were expected", ORIGIN: f"{origin}:{number}"}
    if options["cleaning"] == "speechbrain":
        text = clean(text, language, options["accented_letters"])
        if _too_short(text, language):
            return None
    audio = clips / (name if "." in name else f"{name}.mp3")
    report = inspect_audio(str(audio), samples=False)
    if report.problem is not None:
        return {BROKEN: report.problem, ORIGIN: f"{origin}:{number}"}
    row = {"id": audio.stem, "audio": str(audio.absolute()), "duration": report.duration_s, "text": text,
           "language": language.partition("-")[0], "speaker": fields.get("client_id")}  # fmt: skip
    votes = {key: int(fields[key]) for key in ("up_votes", "down_votes") if (fields.get(key) or "").isdigit()}
    return row | votes | {ORIGIN: f"{origin}:{number}"}


def prepare(
    data_folder: str | None,
    out_folder: Path,
    language: str | None = None,
    cleaning: str = "speechbrain",
    accented_letters: bool = True,
    splits: list[str] | None = None,
    languages: list[str] | None = None,
    max_train: int | None = None,
    max_valid: int | None = None,
    ids_file: str | None = None,
) -> dict[str, Path]:
    """Write one manifest a split; with several languages, one for all of them and one for each (`test_ca`).

    Arguments
    ---------
    data_folder : str
        The language's folder, which holds `clips` and the tsv files.
    out_folder : Path
        Gets `<split>.jsonl`; what was made before of the same files with the same options is kept.
    language : str, optional
        As in Common Voice (`en`, `zh-CN`); None takes the folder's name.
    cleaning : str
        `speechbrain` or `none`.
    accented_letters : bool
        Whether letters keep their accents.
    splits : list of str, optional
        tsv files to read, without their ending; None for train, dev and test, as far as they are there.
    languages : list of str, optional
        Folders of `data_folder` to read, instead of one language.
    max_train, max_valid : int, optional
        Most utterances of train and dev, by votes; None for all.
    ids_file : str, optional
        Takes the utterances that this file names.

    Raises
    ------
    UserError
        Where folder or files are missing, or an option is none of these. Missing and damaged clips are reported when the
        manifest is read, or skipped there.
    """
    if languages:
        if not data_folder or language:
            raise UserError("corpus_options: languages are folders of data_folder, and go without language")
        wanted = [languages] if isinstance(languages, str) else list(languages)
        options = {"cleaning": cleaning, "accented_letters": accented_letters, "splits": splits}
        limits = {"max_train": max_train, "max_valid": max_valid, "ids_file": ids_file}
        parts = {a: prepare(str(Path(data_folder) / a), Path(out_folder) / a, a, **options, **limits) for a in wanted}
        return _join(parts, Path(out_folder))
    root = Path(data_folder or "")
    if not data_folder or not (root / "clips").is_dir():
        raise UserError(
            f"data_folder: '{data_folder}' holds no folder 'clips'; name that of one language, such as .../en"
        )
    if cleaning not in CLEANINGS:
        raise UserError(
            f"corpus_options: cleaning '{cleaning}' is not speechbrain or none.{did_you_mean(cleaning, CLEANINGS)}"
        )
    language = language or root.resolve().name
    wanted = splits or [split for split in SPLITS if (root / f"{split}.tsv").is_file()]
    missing = [split for split in wanted if not (root / f"{split}.tsv").is_file()]
    if missing or not wanted:
        raise UserError(f"data_folder: {root} holds no {(missing or SPLITS)[0]}.tsv")
    manifests, taken, ids = {}, {}, _read_ids(ids_file, language)
    for split in wanted:
        options = {"language": language, "cleaning": cleaning, "accented_letters": accented_letters}
        most = {"train": max_train, "dev": max_valid}.get(split)
        chosen = ids.get(_ID_SPLITS.get(split)) if ids else None
        manifests[split], rows = _read_split(root, Path(out_folder), split, options, most, chosen)
        taken |= {_ID_SPLITS.get(split, split): rows} if rows is not None else {}
    _write_ids(Path(out_folder), {language: taken} if taken else {})
    return manifests


def _read_ids(ids_file: str | None, language: str) -> dict[str, list[int]]:
    """Return the rows to take, by split.

    Raises
    ------
    UserError
        Where the file is missing or of another kind, or does not name the language.
    """
    if not ids_file:
        return {}
    try:
        ids = json.loads(Path(os.path.expandvars(ids_file)).read_text(encoding="utf-8"))[language]
        if all(isinstance(i, int) and i >= 0 for name in ids for i in ids[name]):
            return ids
        raise ValueError("a row is not a whole number")
    except OSError:
        raise UserError(f"corpus_options: there is no ids_file at {ids_file}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"corpus_options: {ids_file} names no rows of '{language}' ({error!r})") from None


def _join(parts: dict[str, dict[str, Path]], out_folder: Path) -> dict[str, Path]:
    """Write one manifest a split for several languages, besides those of each; and one file of ids."""
    manifests = {f"{split}_{language}": path for language, found in parts.items() for split, path in found.items()}
    for split in dict.fromkeys(split for found in parts.values() for split in found):
        paths = [found[split] for found in parts.values() if split in found]
        atomic_write_text(out_folder / f"{split}.jsonl", "".join(path.read_text(encoding="utf-8") for path in paths))
        manifests[split] = out_folder / f"{split}.jsonl"
    ids: dict[str, Any] = {}
    for language in parts:
        path = out_folder / language / "ids.json"
        ids |= json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write_ids(out_folder, ids)
    return manifests


def _write_ids(folder: Path, ids: dict[str, dict[str, list[int]]]) -> None:
    """Write the rows that were taken, by language and split; where all were, there is no such file."""
    path = folder / "ids.json"
    if ids:
        atomic_write_text(path, json.dumps(ids) + "\n")
    else:
        path.unlink(missing_ok=True)


def most_voted(fields: list[dict[str, str] | ValueError], most: int) -> list[int]:
    """Return the rows with the most up votes and, of equals, the fewest down votes; the first of those that are still equal.

    Broken lines have no votes.
    """

    def votes(i: int, key: str) -> int:
        value = "" if isinstance(fields[i], ValueError) else fields[i].get(key) or ""
        return int(value) if value.isdigit() else 0

    ranked = sorted(range(len(fields)), key=lambda i: (-votes(i, "up_votes"), votes(i, "down_votes")))
    return ranked[:most] if len(fields) > most else list(range(len(fields)))


def _read_split(
    root: Path, out_folder: Path, split: str, options: dict[str, object], most: int | None, ids: list[int] | None
) -> tuple[Path, list[int] | None]:
    """Write the manifest of a split, or of the `most` voted or named (`ids`) rows of it, unless it is there.

    Returns it and the rows that were taken, None for all.
    """
    source, manifest = root / f"{split}.tsv", out_folder / f"{split}.jsonl"
    about, made_of = (
        out_folder / f"{split}.source.json",
        {"tsv": str(source.resolve()), "size": source.stat().st_size, **options}
        | ({"most": most} if most else {})
        | ({"ids": hashlib.sha256(str(ids).encode()).hexdigest()} if ids is not None else {}),
    )
    before = json.loads(about.read_text(encoding="utf-8")) if manifest.is_file() and about.is_file() else {}
    if before.get("made_of") == made_of:
        if BROKEN not in manifest.read_text(encoding="utf-8"):  # what was broken may have been mended
            return manifest, before["rows"]
    lines = list(table_rows(source, "\t"))
    if not lines:
        raise UserError(f"{source} holds no utterance")
    first = next((fields for _, fields in lines if not isinstance(fields, ValueError)), {})
    if first and not {"path", "sentence"} <= set(first):
        raise UserError(f"{source} has no columns 'path' and 'sentence'; is it a file of Common Voice?")
    chosen = None
    if ids is not None or most is not None:
        chosen = ids if ids is not None else most_voted([fields for _, fields in lines], most)
        if chosen and max(chosen) >= len(lines):
            raise UserError(
                f"corpus_options: ids_file names row {max(chosen)}, but {source} has {len(lines)}; is it of another release?"
            )
        lines = [lines[i] for i in sorted(chosen)]
    read = functools.partial(_read_line, root / "clips", origin=str(source), **options)
    found = tqdm(in_parallel(read, lines, len(lines) > 500), total=len(lines), desc=split, unit="clip", leave=False)
    rows = [row for row in found if row is not None]
    out_folder.mkdir(parents=True, exist_ok=True)
    write_manifest(manifest, iter(rows))
    atomic_write_text(about, json.dumps({"made_of": made_of, "rows": chosen}) + "\n")
    if len(rows) < len(lines):
        print(f"{split}: {len(lines) - len(rows)} of {len(lines)} sentences are shorter than three words and left out")
    return manifest, chosen
