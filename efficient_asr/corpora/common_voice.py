"""common_voice: the official folder of one language, with `clips/*.mp3`, `train.tsv`, `dev.tsv` and `test.tsv`, of any release.

Texts are cleaned by the rules of SpeechBrain's recipe (common_voice_prepare.py), which the papers used: Unicode is composed;
in the languages listed below only letters, digits and apostrophes are kept; texts are upper-cased; accents are removed on
request; and sentences of fewer than three words (characters, in languages written without spaces) are left out.
`cleaning: none` keeps texts unchanged.

Subsets follow arXiv 2311.01070: `max_train` and `max_valid` select the utterances with the most up votes; ties are broken by
the fewest down votes (3000, 10000 or 28000 for training, 500 or 1000 for validation). The selection is written to `ids.json`
in the layout of the published files, `{language: {"train": [...], "validation": [...]}}`, where the numbers are 0-based rows
of the tsv files. `ids_file` reads such a file. With `languages`, `data_folder` contains one folder per language.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import BROKEN, ORIGIN, Row, in_parallel, inspect_audio, table_rows, write_manifest
from efficient_asr.text.normalise import upper
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.files import atomic_write_text, expanded, file_state

SPLITS = ("train", "dev", "test")
LATIN = "A-Za-z0-9À-ÖØ-öø-ÿЀ-ӿ"
_KEPT = {  # characters kept in a text; other languages keep everything except punctuation
    "en": LATIN + "’'", "fr": LATIN + "’'œŒ", "it": LATIN + "’'", "rw": LATIN + "’'",
    "ga-IE": "-A-Za-z'ÁÉÍÓÚáéíóú", "de": LATIN + "ẞ", "es": "A-Za-z0-9ÁÉÍÑÓÚÜáéíñóúü",
    "ar": "\u0621-\u063a\u0641-\u064a\u0660-\u0669", "fa": "\u0621-\u064a\u067e\u0686\u0698\u06a9\u06af\u06cc\u06f0-\u06f9",
}  # fmt: skip
_UNSPACED = ("ja", "zh-CN", "zh-TW", "zh-HK", "yue", "th", "lo", "km", "my")
CLEANINGS = ("speechbrain", "none")
_ID_SPLITS = {"train": "train", "dev": "validation"}  # split names in files of ids


def clean(text: str, language: str, accented_letters: bool = True) -> str:
    """Clean a sentence; see the module docstring for the rules."""
    text = unicodedata.normalize("NFC", text)
    if language in ("ar", "fa"):  # vowel marks and joiners occur inside words
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
    kept = _KEPT.get(language)
    if kept:
        text = re.sub(f"[^{kept}]+", " ", text)
    else:
        text = "".join(" " if unicodedata.category(c)[0] in "PS" and c not in "’'" else c for c in text)
    if language == "ga-IE":
        return " ".join(map(_irish, text.split()))
    text = upper(text.replace("ß", "ẞ"), language).replace("ẞ", "ß")  # upper() would turn it into two letters
    if language == "fr":  # elided articles become separate words
        text = re.sub("['’]", "' ", text)
    if not accented_letters:
        letters = unicodedata.normalize("NFD", text)
        text = "".join(c for c in letters if unicodedata.category(c) != "Mn").replace("'", " ").replace("’", " ")
    return " ".join(text.split())


def _irish(word: str) -> str:
    """Convert to lower case, and separate a prefixed t or n from the capital vowel that follows (`tAthair` -> `t-athair`)."""
    prefixed = len(word) > 1 and word[0] in "tn" and word[1] in "AEIOUÁÉÍÓÚ"
    return f"{word[0]}-{word[1:].lower()}" if prefixed else word.lower()


def _too_short(text: str, language: str) -> bool:
    return len(text.replace(" ", "") if language in _UNSPACED else text.split()) < 3


def _read_line(
    clips: Path, line: tuple[int, dict[str, str] | ValueError], origin: str, **options: object
) -> Row | None:
    """Read one line of a tsv file. Return None if the sentence is too short; a bad line becomes a row that holds the error."""
    number, fields = line
    if isinstance(fields, ValueError):
        return {BROKEN: str(fields), ORIGIN: f"{origin}:{number}"}
    name, text, language = fields.get("path") or "", fields.get("sentence") or "", options["language"]
    if not name or not text.strip() or "/" in name or "\0" in name:
        return {BROKEN: "expected a path and a sentence", ORIGIN: f"{origin}:{number}"}
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
    """Write one manifest per split; with several languages, one for all of them and one per language (`test_ca`).

    Arguments
    ---------
    data_folder : str
        The language's folder, which contains `clips` and the tsv files.
    out_folder : Path
        Output folder for `<split>.jsonl`. Manifests made earlier from the same files with the same options are reused.
    language : str, optional
        Code as in Common Voice (`en`, `zh-CN`); None for the name of the folder.
    cleaning : str
        `speechbrain` or `none`.
    accented_letters : bool
        Whether letters keep their accents.
    splits : list of str, optional
        tsv files to read, without their suffix; None for those of train, dev and test that exist.
    languages : list of str, optional
        Subfolders of `data_folder` to read, instead of one language.
    max_train, max_valid : int, optional
        Maximum number of utterances of train and dev, selected by votes; None for all.
    ids_file : str, optional
        File that lists the utterances to use.

    Raises
    ------
    UserError
        If the folder or files are missing, or an option is invalid. Missing and damaged clips are reported, or skipped, when
        the manifest is read.
    """
    if languages:
        if not data_folder or language:
            raise UserError(
                "corpus_options: languages needs a data_folder with one folder per language, and cannot be combined with language"
            )
        wanted = [languages] if isinstance(languages, str) else list(languages)
        options = {"cleaning": cleaning, "accented_letters": accented_letters, "splits": splits}
        limits = {"max_train": max_train, "max_valid": max_valid, "ids_file": ids_file}
        parts = {a: prepare(str(Path(data_folder) / a), Path(out_folder) / a, a, **options, **limits) for a in wanted}
        return _join(parts, Path(out_folder))
    root = Path(data_folder or "")
    if not data_folder or not (root / "clips").is_dir():
        raise UserError(
            f"data_folder: '{data_folder}' has no folder 'clips'; give the folder of one language, such as .../en"
        )
    if cleaning not in CLEANINGS:
        raise UserError(
            f"corpus_options: invalid cleaning '{cleaning}'; use speechbrain or none.{did_you_mean(cleaning, CLEANINGS)}"
        )
    for key, value in {"max_train": max_train, "max_valid": max_valid}.items():
        if value is not None and value < 1:
            raise UserError(f"corpus_options: {key} must be at least 1, or null for all utterances; got {value}")
    language = language or root.resolve().name
    wanted = splits or [split for split in SPLITS if (root / f"{split}.tsv").is_file()]
    missing = [split for split in wanted if not (root / f"{split}.tsv").is_file()]
    if missing or not wanted:
        raise UserError(f"data_folder: {root} has no {(missing or SPLITS)[0]}.tsv")
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
    """Return the selected rows of each split.

    Raises
    ------
    UserError
        If the file is missing, has another format, or does not contain the language.
    """
    if not ids_file:
        return {}
    try:
        ids = json.loads(Path(expanded(ids_file)).read_text(encoding="utf-8"))[language]
        if all(isinstance(i, int) and i >= 0 for name in ids for i in ids[name]):
            return ids
        raise ValueError("a row is not a whole number >= 0")
    except OSError:
        raise UserError(f"corpus_options: no ids_file at {ids_file}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"corpus_options: {ids_file} contains no valid rows for '{language}' ({error!r})") from None


def _join(parts: dict[str, dict[str, Path]], out_folder: Path) -> dict[str, Path]:
    """Write one manifest per split that combines all languages, and one file of ids; return all manifests."""
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
    """Write the selected rows by language and split; if all rows were used, remove the file."""
    path = folder / "ids.json"
    if ids:
        atomic_write_text(path, json.dumps(ids) + "\n")
    else:
        path.unlink(missing_ok=True)


def most_voted(fields: list[dict[str, str] | ValueError], most: int) -> list[int]:
    """Return the rows with the most up votes; ties go to the fewest down votes, then to the earlier row.

    Broken lines count as having no votes.
    """

    def votes(i: int, key: str) -> int:
        value = "" if isinstance(fields[i], ValueError) else fields[i].get(key) or ""
        return int(value) if value.isdigit() else 0

    ranked = sorted(range(len(fields)), key=lambda i: (-votes(i, "up_votes"), votes(i, "down_votes")))
    return ranked[:most] if len(fields) > most else list(range(len(fields)))


def _read_split(
    root: Path, out_folder: Path, split: str, options: dict[str, object], most: int | None, ids: list[int] | None
) -> tuple[Path, list[int] | None]:
    """Write the manifest of a split, or of its `most` top-voted or listed (`ids`) rows, unless it is up to date.

    Returns the manifest and the selected rows, None for all.
    """
    source, manifest = root / f"{split}.tsv", out_folder / f"{split}.jsonl"
    about, made_of = (
        out_folder / f"{split}.source.json",
        {"tsv": str(source.resolve()), "state": file_state(source), **options}
        | ({"most": most} if most else {})
        | ({"ids": hashlib.sha256(str(ids).encode()).hexdigest()} if ids is not None else {}),
    )
    before = json.loads(about.read_text(encoding="utf-8")) if manifest.is_file() and about.is_file() else {}
    known = before.get("made_of")
    if isinstance(known, dict) and "size" in known:  # of a former version
        known = {name: value for name, value in known.items() if name != "size"}
        known["state"] = made_of["state"] if before["made_of"]["size"] == source.stat().st_size else None
    if known == made_of:
        if BROKEN not in manifest.read_text(encoding="utf-8"):  # broken clips may have been repaired since
            return manifest, before["rows"]
    lines = list(table_rows(source, "\t"))
    if not lines:
        raise UserError(f"{source} contains no utterances")
    first = next((fields for _, fields in lines if not isinstance(fields, ValueError)), {})
    if first and not {"path", "sentence"} <= set(first):
        raise UserError(f"{source} has no columns 'path' and 'sentence'; is it a Common Voice file?")
    chosen = None
    if ids is not None or most is not None:
        chosen = ids if ids is not None else most_voted([fields for _, fields in lines], most)
        if chosen and max(chosen) >= len(lines):
            raise UserError(
                f"corpus_options: ids_file lists row {max(chosen)}, but {source} has {len(lines)}; is it for another release?"
            )
        lines = [lines[i] for i in sorted(chosen)]
    read = functools.partial(_read_line, root / "clips", origin=str(source), **options)
    found = tqdm(in_parallel(read, lines, len(lines) > 500), total=len(lines), desc=split, unit="clip", leave=False)
    rows = [row for row in found if row is not None]
    out_folder.mkdir(parents=True, exist_ok=True)
    write_manifest(manifest, iter(rows))
    atomic_write_text(about, json.dumps({"made_of": made_of, "rows": chosen}) + "\n")
    if len(rows) < len(lines):
        print(f"{split}: left out {len(lines) - len(rows)} of {len(lines)} sentences that are shorter than three words")
    return manifest, chosen
