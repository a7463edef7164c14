"""Text normalisers for scoring and training."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path

from num2words import CONVERTER_CLASSES, num2words

from efficient_asr.text.languages import has_code_form, is_language, normalise_or_keep, number_separators
from efficient_asr.utils.errors import UserError, did_you_mean

MAX_DIGITS = 12  # longer numbers are spelled digit by digit
_MAX_DIGITS = {"am": 5}  # num2words never returns for some longer numbers
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})
_HYPHENS = re.compile(r"[-‐‑‒–—―_/]")
_NO_BREAK_SPACES = "\u00a0\u2009\u202f"  # thousands separators in any language
_TURKIC = {"tr", "az"}  # languages with a dotted and a dotless i
# What num2words raises for numbers that it cannot spell in a language.
_GAPS = (NotImplementedError, ArithmeticError, LookupError, TypeError, AttributeError, ValueError)
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)


@functools.cache
def _number_patterns(language: str) -> tuple[re.Pattern, re.Pattern, str]:
    """Return the pattern of digits with separators, the pattern of one number, and the decimal separator of a language."""
    decimal, group = number_separators(language)
    between = _NO_BREAK_SPACES + "'" + (" " if group in _NO_BREAK_SPACES else group)  # 1'000 in Switzerland
    chain = rf"\d+(?:[{re.escape(between + decimal)}.,]\d+)*"
    grouped = rf"[1-9]\d{{0,2}}(?P<group>[{re.escape(between)}])\d{{3}}(?:(?P=group)\d{{3}})*"
    lakhs = r"|[1-9]\d?(?:,\d{2})+,\d{3}" if group == "," else ""  # 1,00,000 in India
    return re.compile(chain), re.compile(rf"(?:{grouped}{lakhs}|\d+)(?:{re.escape(decimal)}\d+)?"), decimal


def spell_numbers(text: str, language: str = "en") -> str:
    """Spell out digits as words: `chapter 42` -> `chapter forty-two`. Languages unknown to num2words keep their digits.

    Numbers that are too long, or that num2words cannot spell, are spelled digit by digit. Decimal and thousands separators are
    those of the language: `1.000,5` in German is `1,000.5` in English. Digits that do not form one number by its rules, such as
    `192.168.1.1` or `1,2,3`, are read as several numbers.
    """
    chain, number, decimal = _number_patterns(language)
    # Arabic has its own separators, used with its own digits.
    text = text.translate({0x66B: decimal, 0x66C: number_separators(language)[1]})

    def words(digits: str, kind: str) -> str:
        if len(digits) <= _MAX_DIGITS.get(language, MAX_DIGITS):
            with contextlib.suppress(*_GAPS):
                value = Decimal(digits) if "." in digits else int(digits)
                if spelled := num2words(value, lang=str(language), to=kind).strip():
                    return f" {spelled} "
        with contextlib.suppress(*_GAPS):
            return "".join(f" {num2words(int(digit), lang=str(language))} " for digit in digits if digit.isdecimal())
        return f" {digits} "

    def spell(match: re.Match) -> str:
        if not number.fullmatch(match[0]):
            return "".join(words(digits, "cardinal") for digits in re.findall(r"\d+", match[0]))
        whole, _, fraction = match[0].partition(decimal)
        digits = "".join(re.findall(r"\d+", whole))
        return words(f"{digits}.{fraction}" if fraction else digits, "cardinal")

    if _keeps_digits(language):
        return text
    return chain.sub(spell, _ORDINAL.sub(lambda match: words(match[1], "ordinal"), text))


@functools.cache
def _keeps_digits(language: str) -> bool:
    """Whether digits are kept: in languages unknown to num2words, where numbers would otherwise be lost."""
    known = {name.partition("_")[0] for name in CONVERTER_CLASSES}
    is_code = is_language(language) or has_code_form(language)
    return language not in known and language == normalise_or_keep(language) and is_code


def lower(text: str, language: str) -> str:
    """Return a text in lower case; Turkish and Azerbaijani have a dotted and a dotless i."""
    if language in _TURKIC:
        text = text.replace("I", "ı").replace("İ", "i")
    return text.lower()


def upper(text: str, language: str) -> str:
    """Return a text in upper case; see `lower`."""
    return (text.replace("i", "İ") if language in _TURKIC else text).upper()


def normalise_plain(text: str, language: str = "en") -> str:
    """Lower case, numbers as words, letters with their marks and inner apostrophes only, single spaces.

    This is the convention of LibriSpeech transcripts, in lower case. Combining marks are kept, since many scripts
    cannot be read without them. Format characters inside words, such as soft hyphens and joiners, are removed.
    """
    language = normalise_or_keep(language)
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES).replace("\u200b", " ")  # zero-width space
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = _HYPHENS.sub(" ", lower(spell_numbers(text, language), language))
    keeps_digits = _keeps_digits(language)
    text = "".join(
        c if unicodedata.category(c)[0] in "LM" or c == "'" or (keeps_digits and c.isdecimal()) else " " for c in text
    )
    text = re.sub(r"(?<!\w)'+|'+(?!\w)", " ", text)
    return " ".join(text.split())


def normalise_none(text: str, language: str = "en") -> str:
    """Only collapse whitespace."""
    return " ".join(text.split())


_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")


@functools.cache
def _english() -> Callable[[str], str]:
    """Return Whisper's English normaliser from transformers, with OpenAI's spelling table.

    Published error rates are computed with it. transformers lacks the table, so it is read from the package whisper-normalizer,
    whose own normaliser differs ("cause of death" becomes "because of death").
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # located, not imported: importing the package takes a second
    folder = Path(importlib.util.find_spec("whisper_normalizer").origin).parent
    return EnglishTextNormalizer(json.loads((folder / "normalizers" / "english.json").read_text(encoding="utf-8")))


def normalise_whisper_basic(text: str, language: str = "en") -> str:
    """Whisper's normaliser for languages other than English: lower case, no bracketed text, no punctuation.

    Whisper's own also turns combining marks into spaces, which splits the words of Hindi, Thai and many other scripts
    and makes their error rates meaningless. Marks are kept here. For languages without marks, both are the same.
    """
    text = unicodedata.normalize("NFKC", _BRACKETS.sub("", text.lower()))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "SP" else c for c in text).lower().split())


def normalise_whisper(text: str, language: str = "en") -> str:
    """Whisper's normaliser: the English one (spelling, numbers, contractions, fillers) for English, else the basic one.

    Source: arXiv 2212.04356, appendix C.
    """
    english = normalise_or_keep(language) == "en"
    return _english()(text).strip() if english else normalise_whisper_basic(text, language)


# Scripts written without spaces between words: Han, Hiragana, Katakana, Thai, Lao, Myanmar, Khmer. A character keeps its
# marks.
_UNSPACED = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f\u3005\u3041-\u3096\u30a1-\u30fa\u30fc"
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


def normalise_multilingual(text: str, language: str = "en") -> str:
    """Whisper's normaliser for the language; each character of a script without spaces, with its marks, becomes a word.

    The word error rates of such languages are then character error rates, as published (arXiv 2311.01070, 2212.04356).
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


@functools.cache
def _simplified() -> Callable[[str], str]:
    """Return OpenCC's conversion of traditional Chinese to simplified Chinese."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError("normaliser 'chinese': OpenCC is not installed: pip install 'efficient_asr[chinese]'") from None
    return OpenCC("t2s").convert


def normalise_chinese(text: str, language: str = "zh") -> str:
    """As `normalise_multilingual`, with traditional characters as simplified ones: both count as the same word."""
    return normalise_multilingual(_simplified()(text), language)


def words_of(text: str) -> list[str]:
    """Split a text into words, each with the space in front of it; joined, they give the text without surplus spaces.

    A character of a script without spaces, with its marks, is a word.
    """
    words: list[str] = []
    space = ""
    for part in _UNSPACED.split(" ".join(text.split())):
        sign = len(part) == 1 and _UNSPACED.match(part) is not None
        if sign and words and not space and unicodedata.category(part)[0] == "M":
            words[-1] += part
        elif sign:
            words.append(space + part)
        else:
            found = re.findall(r" ?[^ ]+", part)
            if found:
                found[0] = space + found[0]
            words += found
        space = " " if part.endswith(" ") else "" if part else space
    return words


def spaced(text: str) -> str:
    """Return a text with a space in front, as Whisper writes it; without one in scripts without spaces."""
    text = text.strip()
    return text if not text or _UNSPACED.match(text) else f" {text}"


def join_signs(text: str) -> str:
    """Remove the spaces that `normalise_multilingual` inserted between characters, for counting characters."""
    words = text.split()
    parts = words[:1]
    for before, word in itertools.pairwise(words):
        joined = _UNSPACED.match(before) is not None and _UNSPACED.match(word) is not None
        parts.append(word if joined else f" {word}")
    return "".join(parts)


def whisper_normaliser(languages: Iterable[str | None]) -> str:
    """Return the name of the normaliser for Whisper's transcripts: `whisper` if all are English, otherwise `multilingual`."""
    return "whisper" if {normalise_or_keep(language) for language in languages} <= {"en"} else "multilingual"


Normaliser = Callable[[str, str], str]
NORMALISERS: dict[str, Normaliser] = {
    "plain": normalise_plain, "none": normalise_none, "whisper": normalise_whisper, "whisper_basic": normalise_whisper_basic,
    "multilingual": normalise_multilingual, "chinese": normalise_chinese,
}  # fmt: skip


def get_normaliser(name: str) -> Normaliser:
    """Return a normaliser by name.

    Raises
    ------
    UserError
        If there is no normaliser of that name.
    """
    if name not in NORMALISERS:
        hint = did_you_mean(name, NORMALISERS)
        raise UserError(f"unknown normaliser '{name}'; use one of {', '.join(NORMALISERS)}.{hint}")
    return NORMALISERS[name]
