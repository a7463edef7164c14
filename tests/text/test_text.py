from __future__ import annotations

import pytest

from efficient_asr.text.labels import CharacterLabels
from efficient_asr.text.normalise import get_normaliser, normalise_plain
from efficient_asr.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Author of the danger trail, Philip Steels, etc.", "author of the danger trail philip steels etc"),
        ("DON’T  stop—now", "don't stop now"),
        ("'quoted' words'", "quoted words"),
        ("Chapter 42.", "chapter forty two"),
        ("the 3rd of May, 1,200 men", "the third of may one thousand two hundred men"),
        ("हिन्दी", "हिन्दी"),
        ("Ünïcode café", "ünïcode café"),
        ("...", ""),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert normalise_plain(text) == expected


def test_plain_is_idempotent() -> None:
    once = normalise_plain("It's 5 o'clock — 'tis the 21st!")
    assert normalise_plain(once) == once


def test_numbers_in_the_language_of_the_text() -> None:
    assert normalise_plain("7 Tage", "de") == "sieben tage"
    assert normalise_plain("7 x", "xx") == "x"  # a language num2words does not know: no words, so nothing is left


@pytest.mark.parametrize("language", ["en", "fa", "id", "vi", "am", "es", "zz", "th"])
@pytest.mark.parametrize(
    "text", ["7", "3.5", "1234567", "999999999", "123456789012", "1234567890123", "9" * 400, "12th", "007", "1,2,3"]
)
def test_numbers_never_stop_a_run(text: str, language: str) -> None:
    assert isinstance(normalise_plain(f"a {text} b", language), str)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (
            "my card is 4111111111111 thanks",
            "en",
            "my card is four one one one one one one one one one one one one thanks",
        ),
        ("IBAN 1234567890123", "de", "iban eins zwei drei vier fünf sechs sieben acht neun null eins zwei drei"),
        ("yüzde 10,05 arttı", "tr", "yüzde bir sıfır sıfır beş arttı"),
        ("7 x", "nhi", "7 x"),  # an ISO 639-3 code that num2words and CLDR do not know
    ],
)
def test_numbers_that_cannot_be_spelled_are_never_lost(text: str, language: str, expected: str) -> None:
    assert normalise_plain(text, language) == expected


def test_numbers_that_num2words_cannot_spell_in_amharic_are_spelled_digit_by_digit() -> None:
    digits = [normalise_plain(str(digit), "am") for digit in range(10)]
    assert normalise_plain("9999", "am") == " ".join([digits[9]] * 4) != ""
    assert normalise_plain("1234567", "am") == " ".join(digits[1:8])


def test_unknown_normaliser_names_the_closest() -> None:
    with pytest.raises(UserError, match="Did you mean 'plain'"):
        get_normaliser("plan")


def test_labels_round_trip() -> None:
    labels = CharacterLabels.from_texts(["abc", "cab d'or"])
    text = "bad cab"
    assert labels.decode(labels.encode(text)) == text
    assert len(labels) == len(set("abc cab d'or")) + 1
    assert 0 not in labels.encode(text)
    assert labels.unknown("abcx!") == {"x", "!"}
    assert labels.vocabulary[0] == ""
