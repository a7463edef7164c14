"""common_voice: the official folder of one language: `clips/*.mp3` and `train.tsv`, `dev.tsv`, `test.tsv`, of any release.

Texts are cleaned by the rules of SpeechBrain's recipe (common_voice_prepare.py), which the papers used: Unicode composed;
in the languages below only letters, digits and apostrophes stay, in upper case; without accents if asked for; and sentences
of fewer than three words (characters, where words are not written apart) are left out. `cleaning: none` keeps texts as they
are.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import unicodedata
from pathlib import Path

from tqdm import tqdm

from efficient_asr.data import BROKEN, ORIGIN, Row, in_parallel, inspect_audio, write_manifest
from efficient_asr.errors import UserError, did_you_mean

SPLITS = ("train", "dev", "test")
LATIN = "A-Za-z0-9À-ÖØ-öø-ÿЀ-ӿ"
_KEPT = {  # what stays in a text; other languages keep everything but punctuation
    "en": LATIN + "’'", "fr": LATIN + "’'œŒ", "it": LATIN + "’'", "rw": LATIN + "’'",
    "ga-IE": "-A-Za-z'ÁÉÍÓÚáéíóú", "de": LATIN + "ẞ", "es": "A-Za-z0-9ÁÉÍÑÓÚÜáéíñóúü",
    "ar": "\u0621-\u063a\u0641-\u064a\u0660-\u0669", "fa": "\u0621-\u064a\u067e\u0686\u0698\u06a9\u06af\u06cc\u06f0-\u06f9",
}  # fmt: skip
_UNSPACED = ("ja", "zh-CN", "zh-TW", "zh-HK", "yue", "th", "lo", "km", "my")
CLEANINGS = ("speechbrain", "none")


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
    text = text.replace("ß", "ẞ").upper().replace("ẞ", "ß")  # upper case would make it two letters
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


def _read_line(clips: Path, line: tuple[int, dict[str, str]], origin: str, **options: object) -> Row | None:
    """Read one line of a tsv file; None for a sentence that is too short, and what is wrong becomes a row that says so."""
    number, fields = line
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
) -> dict[str, Path]:
    """Write one manifest a split.

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

    Raises
    ------
    UserError
        Where folder or files are missing, or an option is none of these. Missing and damaged clips are reported when the
        manifest is read, or skipped there.
    """
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
    manifests = {}
    for split in wanted:
        options = {"language": language, "cleaning": cleaning, "accented_letters": accented_letters}
        manifests[split] = _read_split(root, Path(out_folder), split, options)
    return manifests


def _read_split(root: Path, out_folder: Path, split: str, options: dict[str, object]) -> Path:
    """Write the manifest of a split, unless it is there."""
    source, manifest = root / f"{split}.tsv", out_folder / f"{split}.jsonl"
    about, made_of = (
        out_folder / f"{split}.source.json",
        {"tsv": str(source.resolve()), "size": source.stat().st_size, **options},
    )
    if manifest.is_file() and about.is_file() and json.loads(about.read_text(encoding="utf-8")) == made_of:
        if BROKEN not in manifest.read_text(encoding="utf-8"):  # what was broken may have been mended
            return manifest
    with open(source, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"path", "sentence"} <= set(reader.fieldnames or ()):
            raise UserError(f"{source} has no columns 'path' and 'sentence'; is it a file of Common Voice?")
        lines = list(enumerate(reader, start=2))
    if not lines:
        raise UserError(f"{source} holds no utterance")
    read = functools.partial(_read_line, root / "clips", origin=str(source), **options)
    found = tqdm(in_parallel(read, lines, len(lines) > 500), total=len(lines), desc=split, unit="clip", leave=False)
    rows = [row for row in found if row is not None]
    out_folder.mkdir(parents=True, exist_ok=True)
    write_manifest(manifest, iter(rows))
    about.write_text(json.dumps(made_of), encoding="utf-8")
    if len(rows) < len(lines):
        print(f"{split}: {len(lines) - len(rows)} of {len(lines)} sentences are shorter than three words and left out")
    return manifest
