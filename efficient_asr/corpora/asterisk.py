"""Asterisk's telephone prompts: transcribed real speech in English, Spanish, French, Italian and Russian.

Debian and Ubuntu ship the audio as `asterisk-core-sounds-<language>-g722` (16 kHz) and the texts as
`asterisk-core-sounds-<language>`: about 27 minutes per language, each read by one professional voice, CC BY-SA 3.0 (Russian:
CC BY 3.0). `data_folder` holds the packages (`.deb`) or the files extracted from them with `dpkg -x`. With `download: True`,
`apt-get download` fetches the packages into `data_folder`; it does not need root.

The split of an utterance is determined by a hash of its text, so no text occurs in two splits.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from efficient_asr.data import ORIGIN, SAMPLE_RATE, Row, in_parallel, write_manifest
from efficient_asr.text.normalise import normalise_plain
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.files import atomic_write

VOICES = {
    "en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU",
}  # fmt: skip
SHARES = {"test": 0.15, "dev": 0.1}  # fraction of the texts; the rest is used for training
PACKAGES = ("asterisk-core-sounds-{}-g722", "asterisk-core-sounds-{}")


def split_of(text: str) -> str:
    """Return the split of a text. Texts that differ only in case, punctuation and whitespace get the same split."""
    place = int(hashlib.sha256(normalise_plain(text).encode()).hexdigest()[:8], 16) / 16**8
    return "test" if place < SHARES["test"] else "dev" if place < sum(SHARES.values()) else "train"


def _unpack(folder: Path, language: str, download: bool) -> Path:
    """Return the folder that contains `usr/share` of a language's packages; fetch and unpack them if necessary.

    Raises
    ------
    UserError
        If the packages are missing and cannot be fetched.
    """
    texts = f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    sounds = f"usr/share/asterisk/sounds/{VOICES[language]}"
    for root in (folder, folder / "unpacked"):
        if (root / texts).is_file() and (root / sounds).is_dir():
            return root
    names = [name.format(language) for name in PACKAGES]
    if download and not all(list(folder.glob(f"{name}_*.deb")) for name in names):
        if not shutil.which("apt-get"):
            raise UserError(
                "corpus_options: download needs apt-get, which is not installed here; fetch the packages on another machine"
            )
        print(f"fetching {' and '.join(names)}")
        done = subprocess.run(["apt-get", "download", *names], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"apt-get download {' '.join(names)} failed in {folder}: {done.stderr.strip().splitlines()[-1]}"
            )
    for name in names:
        packages = sorted(folder.glob(f"{name}_*.deb"))
        if not packages:
            raise UserError(
                f"data_folder: {folder} contains neither {name}_*.deb nor its extracted files; run "
                f"`apt-get download {' '.join(names)}` there, or set the corpus option download: True"
            )
        if not shutil.which("dpkg"):
            raise UserError(
                f"{packages[-1]} must be unpacked, but dpkg is not installed; unpack it elsewhere and copy the files to {folder}"
            )
        done = subprocess.run(
            ["dpkg", "-x", packages[-1], folder / "unpacked"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"{packages[-1]} cannot be unpacked ({done.stderr.strip()}); fetch it again")
    return folder / "unpacked"


def read_texts(path: Path) -> dict[str, str]:
    """Return the text of every prompt. Prompts whose text contains brackets are sounds, not speech, and are left out."""
    texts = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8-sig", errors="replace").split("\n"):
        name, colon, text = line.partition(":")
        text = " ".join(text.split())
        if colon and not line.startswith(";") and text and not {"[", "<", "("} & set(text):
            texts[name.strip()] = text
    return texts


def _convert(out_folder: Path, item: tuple[str, str, str, Path]) -> Row | None:
    """Write one prompt as FLAC and return its row, or None if it is too short to be speech."""
    import av

    language, name, text, source = item
    target = out_folder / "audio" / language / f"{name.replace('/', '-')}.flac"
    if not target.is_file():
        try:
            with av.open(str(source), format="g722") as container:
                samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
        except (OSError, ValueError) as error:
            raise UserError(f"{source} cannot be decoded ({error}); fetch its package again") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, shared=True) as partial:
            soundfile.write(partial, samples, SAMPLE_RATE, format="FLAC")
    duration = soundfile.info(target).frames / SAMPLE_RATE
    if duration < 0.2:
        return None
    return {
        "id": f"{language}-{target.stem}", "audio": str(target.absolute()), "duration": round(duration, 3), "text": text,
        "language": language, "speaker": VOICES[language], "split": split_of(text), ORIGIN: f"{source}",
    }  # fmt: skip


def prepare(
    data_folder: str | None,
    out_folder: Path,
    languages: list[str] | None = None,
    min_words: int = 1,
    download: bool = False,
) -> dict[str, Path]:
    """Write one manifest per split, and one per split and language (`test_fr`).

    Arguments
    ---------
    data_folder : str
        Folder of the packages or of their extracted files.
    out_folder : Path
        Output folder for `<split>.jsonl`, `<split>_<language>.jsonl` and the audio as FLAC.
    languages : list of str, optional
        Any of en, es, fr, it, ru; None for all.
    min_words : int
        Prompts with fewer words are left out.
    download : bool
        Fetch missing packages.

    Raises
    ------
    UserError
        If packages are missing or damaged, or PyAV is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("corpus asterisk: decoding g722 needs PyAV: pip install av") from None
    chosen = list(VOICES) if languages is None else [languages] if isinstance(languages, str) else list(languages)
    for language in chosen:
        if language not in VOICES:
            raise UserError(
                f"corpus_options: no language '{language}'; choose from {', '.join(VOICES)}.{did_you_mean(language, VOICES)}"
            )
    if not data_folder or (not Path(data_folder).is_dir() and not download):
        raise UserError(
            f"data_folder: '{data_folder}' is not a folder; give the folder of the packages (download: True fetches them)"
        )
    folder, out_folder, items = Path(data_folder), Path(out_folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for language in chosen:
        root = _unpack(folder, language, download)
        for name, text in read_texts(
            root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        ).items():
            source = root / f"usr/share/asterisk/sounds/{VOICES[language]}/{name}.g722"
            if source.is_file() and len(text.split()) >= min_words:
                items.append((language, name, text, source))
    convert = functools.partial(_convert, out_folder)
    found = tqdm(
        in_parallel(convert, items, len(items) > 500), total=len(items), desc="prompts", unit="prompt", leave=False
    )
    rows = [row for row in found if row is not None]
    manifests = {}
    for split in ("train", "dev", "test"):
        of_split = [row for row in rows if row["split"] == split]
        groups = {split: of_split} | {f"{split}_{a}": [row for row in of_split if row["language"] == a] for a in chosen}
        for name, group in groups.items():
            if group:
                manifests[name] = write_manifest(out_folder / f"{name}.jsonl", iter(group))
    return manifests
