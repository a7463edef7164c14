"""Language tags become one code; texts are normalised by the rules of their language."""

from __future__ import annotations

import pytest

from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.text.languages import normalise_language, number_separators
from efficient_asr.text.normalise import lower, normalise_plain, normalise_whisper, upper
from efficient_asr.utils.errors import UserError


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("EN", "en"),
        ("en-US", "en"),
        ("en_GB", "en"),
        ("eng", "en"),
        ("English", "en"),
        (" german ", "de"),
        ("ger", "de"),
        ("deu", "de"),
        ("zh-Hant-TW", "zh"),
        ("cmn_hans_cn", "zh"),
        ("nb", "no"),
        ("nob", "no"),
        ("jv", "jw"),
        ("jav", "jw"),
        ("fil", "tl"),
        ("tl", "tl"),
        ("iw", "he"),
        ("swh", "sw"),
        ("yue", "yue"),
        ("haw", "haw"),
        ("ga-IE", "ga"),
        ("ga", "ga"),
        ("<|fr|>", "fr"),
        ("castilian", "es"),
    ],
)
def test_tags(tag: str, code: str) -> None:
    assert normalise_language(tag) == code


def test_every_language_of_whisper_is_its_own_code() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    assert [code for code in LANGUAGES if normalise_language(code) != code] == []
    assert [name for name, code in TO_LANGUAGE_CODE.items() if normalise_language(name) != code] == []


@pytest.mark.parametrize(
    ("tag", "hint"), [("egnlish", "english"), ("calatan", "catalan"), ("xx", ""), ("und", ""), ("", "")]
)
def test_what_is_no_language_is_refused(tag: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"'{tag}' is not a language.*{hint}"):
        normalise_language(tag)


def test_a_benchmark_does_not_depend_on_how_its_tags_are_written() -> None:
    row = {"id": "u", "audio": "a.wav", "duration": 1.0, "text": "It's colour, Mr. X"}
    hashes = {
        Benchmark("c", "s", [row | {"language": tag}], "whisper").hash for tag in ("EN", "en-GB", "English", "en")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("1.000.000", "de", "eine million"),
        ("3,5", "de", "drei komma fünf"),
        ("3.5", "de", "drei fünf"),
        ("3.5", "en", "three point five"),
        ("am 24.12.2020", "de", "am vierundzwanzig zwölf zweitausendzwanzig"),
        ("1\u202f000,5", "fr", "mille virgule cinq"),
        ("10 000 personnes", "fr", "dix mille personnes"),
        ("2.500", "nl", "tweeduizendvijfhonderd"),
        ("1,200.5", "en", None),
        ("Wör\u00adter", "de", "wörter"),
        ("می\u200cخواهم", "fa", "میخواهم"),
        ("a\u200bb", "th", "a b"),
        ("\ufeffone", "en", "one"),
        ("ISPARTA İstanbul", "tr", "ısparta istanbul"),
        ("ISPARTA", "en", "isparta"),
        ("12.345", "EN-us", "twelve point three four five"),
    ],
)
def test_plain_texts(text: str, language: str, expected: str | None) -> None:
    if expected is None:
        expected = "one thousand two hundred point five"
    assert normalise_plain(text, language) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("12'345", "de", "zwölftausenddreihundertfünfundvierzig"),
        ("192.168.1.1", "de", "einhundertzweiundneunzig einhundertachtundsechzig eins eins"),
        ("1,2,3", "de", "eins zwei drei"),
        ("1,2,3", "en", "one two three"),
        ("030 123 456", "fr", "trente cent vingt trois quatre cent cinquante six"),
        ("2020年", "zh", "2020年"),
        ("१२३ x", "hi", "१२३ x"),
    ],
)
def test_numbers_that_are_several_or_cannot_be_said(text: str, language: str, expected: str) -> None:
    assert normalise_plain(text, language) == expected


def test_case_of_turkish_comes_back() -> None:
    text = "istanbul ısparta"
    assert lower(upper(text, "tr"), "tr") == text and upper(text, "tr") == "İSTANBUL ISPARTA"
    assert number_separators("de") == (",", ".") and number_separators("zz") == (".", ",")


def test_the_english_normaliser_is_that_of_published_error_rates() -> None:
    assert normalise_whisper("The cause of death; colour", "en") == "the cause of death color"
