"""Text: normalisers for scoring and training, and the character labels of CTC models."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal

from num2words import num2words
from whisper_normalizer.english import EnglishTextNormalizer

from efficient_asr.errors import UserError, did_you_mean

MAX_DIGITS = 12  # longer ones are no numbers that anyone says
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})
_HYPHENS = re.compile(r"[-‐‑‒–—―_/]")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)


def spell_numbers(text: str, language: str = "en") -> str:
    """Write digits as words: `chapter 42` -> `chapter forty-two`. Languages unknown to num2words keep their digits."""

    def spell(match: re.Match, kind: str) -> str:
        digits = match[1] if kind == "ordinal" else match[0].replace(",", "")
        if len(digits) > MAX_DIGITS:
            return f" {match[0]} "
        try:
            number = Decimal(digits) if "." in digits else int(digits)
            return f" {num2words(number, lang=str(language), to=kind)} "
        except (NotImplementedError, ArithmeticError, LookupError, TypeError, AttributeError, ValueError):
            return f" {match[0]} "  # num2words has gaps in many languages

    text = _ORDINAL.sub(lambda match: spell(match, "ordinal"), text)
    return _NUMBER.sub(lambda match: spell(match, "cardinal"), text)


def normalise_plain(text: str, language: str = "en") -> str:
    """Lower case, numbers as words, letters with their marks and inner apostrophes only, single spaces.

    This is the convention of LibriSpeech transcripts, in lower case. Combining marks are kept, since many scripts
    cannot be read without them.
    """
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES)
    text = _HYPHENS.sub(" ", spell_numbers(text, language).lower())
    text = "".join(c if unicodedata.category(c)[0] in "LM" or c == "'" else " " for c in text)
    text = re.sub(r"(?<!\w)'+|'+(?!\w)", " ", text)
    return " ".join(text.split())


def normalise_none(text: str, language: str = "en") -> str:
    """Only collapse white space."""
    return " ".join(text.split())


_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_english = functools.cache(EnglishTextNormalizer)


def normalise_whisper_basic(text: str, language: str = "en") -> str:
    """Whisper's normaliser for languages other than English: lower case, no brackets and what they hold, no punctuation.

    Whisper's own also turns combining marks into spaces, which tears the words of Hindi, Thai and many other scripts apart
    and makes their error rates meaningless; here marks are kept. Where a language has none, both are the same.
    """
    text = unicodedata.normalize("NFKC", _BRACKETS.sub("", text.lower()))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "SP" else c for c in text).lower().split())


def normalise_whisper(text: str, language: str = "en") -> str:
    """Whisper's normaliser: that for English (spelling, numbers, contractions, fillers), or the basic one elsewhere.

    Source: arXiv 2212.04356, appendix C; the English one is the package `whisper-normalizer`.
    """
    return _english()(text).strip() if language == "en" else normalise_whisper_basic(text, language)


# Scripts that are written without spaces between words: Han, Hiragana, Katakana, Thai, Lao, Myanmar, Khmer. A sign keeps its
# marks.
_UNSPACED = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f\u3005\u3041-\u3096\u30a1-\u30fa\u30fc"
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


def normalise_multilingual(text: str, language: str = "en") -> str:
    """Whisper's normaliser of the language, with the signs of scripts without spaces (and their marks) as words of their own.

    Word error rates of such languages are then rates of signs, which is how they are published (arXiv 2311.01070, 2212.04356).
    """
    text = normalise_whisper(text, language)
    out = []
    for part in _UNSPACED.split(text):
        mark = len(part) == 1 and unicodedata.category(part)[0] == "M"
        sign = len(part) == 1 and _UNSPACED.match(part) is not None
        out.append(part if mark or not sign else f" {part}")
        if part and not sign and len(out) > 1 and not part[0].isspace() and unicodedata.category(part[0])[0] != "M":
            out[-1] = f" {part}"  # a word of another script begins
    return " ".join("".join(out).split())


def join_signs(text: str) -> str:
    """Take the spaces out again that `normalise_multilingual` put between signs, for counting characters."""
    words = text.split()
    parts = words[:1]
    for before, word in itertools.pairwise(words):
        joined = _UNSPACED.match(before) is not None and _UNSPACED.match(word) is not None
        parts.append(word if joined else f" {word}")
    return "".join(parts)


Normaliser = Callable[[str, str], str]
NORMALISERS: dict[str, Normaliser] = {
    "plain": normalise_plain, "none": normalise_none, "whisper": normalise_whisper, "whisper_basic": normalise_whisper_basic,
    "multilingual": normalise_multilingual,
}  # fmt: skip


def get_normaliser(name: str) -> Normaliser:
    """Return a normaliser by name.

    Raises
    ------
    UserError
        Where there is none of that name.
    """
    if name not in NORMALISERS:
        hint = did_you_mean(name, NORMALISERS)
        raise UserError(f"unknown normaliser '{name}'; there are {', '.join(NORMALISERS)}.{hint}")
    return NORMALISERS[name]


class CharacterLabels:
    """The output alphabet of a CTC model: index 0 is the blank, the others are single characters.

    Unlike the papers' recipes there are no begin and end symbols: CTC never uses them.

    Arguments
    ---------
    characters : list of str
        The characters, without the blank.
    """

    blank_index = 0

    def __init__(self, characters: list[str]) -> None:
        self.characters = list(characters)
        self.index = {character: i for i, character in enumerate(self.characters, start=1)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharacterLabels:
        """Collect the characters of the training texts, in code point order; a space is always among them."""
        seen = {" "}
        for text in texts:
            seen.update(text)
        return cls(sorted(seen))

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """Return label indices; characters outside the alphabet are left out (`unknown` lists them)."""
        return [self.index[character] for character in text if character in self.index]

    def encode_row(self, row: dict) -> list[int]:
        """Return the label indices of an utterance's text."""
        return self.encode(row["text"])

    def unknown(self, text: str) -> set[str]:
        """Return the characters of `text` that the alphabet lacks."""
        return set(text) - set(self.index)

    def decode(self, indices: Iterable[int]) -> str:
        """Join labels (blanks and repeats already removed) to text with single spaces."""
        return " ".join("".join(self.characters[i - 1] for i in indices).split())

    @property
    def vocabulary(self) -> list[str]:
        """All outputs by index, the blank as an empty string."""
        return ["", *self.characters]
