"""Language tags: every tag from a user, a corpus or a model is converted to one code as soon as it is read.

`EN`, `en-US`, `en_GB`, `eng` and `English` are all `en`. Codes are ISO 639-1 if there is one, ISO 639-3 otherwise
(`yue`, `haw`), and Whisper's own for the three languages that it names differently (`no`, `jw`, `tl`). Codes, names and
aliases come from the Unicode CLDR, through the package Babel.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.numbers import get_decimal_symbol, get_group_symbol

from efficient_asr.utils.errors import UserError, did_you_mean

WHISPER_CODES = {"nb": "no", "jv": "jw", "fil": "tl"}  # CLDR's code -> Whisper's
_CLDR_CODES = {ours: cldr for cldr, ours in WHISPER_CODES.items()}
_NO_LANGUAGE = ("und", "mul", "zxx", "mis", "root")
_MORE = {
    "cnh": "hakha chin",
    "quy": "ayacucho quechua",
    "skr": "saraiki",
}  # languages of Common Voice missing from CLDR's list of names
_OTHER_NAMES = {  # further names known to Whisper
    "burmese": "my", "valencian": "ca", "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "pushto": "ps", "panjabi": "pa",
    "moldavian": "ro", "moldovan": "ro", "sinhalese": "si", "castilian": "es", "mandarin": "zh", "farsi": "fa", "norwegian": "no",
    "bengali": "bn", "nynorsk": "nn", "myanmar": "my",
}  # fmt: skip


def _plain(name: str) -> str:
    """Return a name in lower case, without accents or extra spaces."""
    letters = unicodedata.normalize("NFKD", " ".join(name.lower().split()))
    return "".join(c for c in letters if not unicodedata.combining(c))


@functools.cache
def _codes_by_name() -> dict[str, str]:
    """Return CLDR's codes by English name in lower case."""
    names = {_plain(name): code for code, name in Locale("en").languages.items() if "_" not in code}
    names |= {name: code for code, name in _MORE.items()} | _OTHER_NAMES
    return {name: code for name, code in names.items() if code not in _NO_LANGUAGE}


@functools.cache
def normalise_language(tag: str) -> str:
    """Return the code of a language.

    Arguments
    ---------
    tag : str
        ISO 639-1, 639-2 or 639-3 code, in any case, with or without script and region, or the language's English name.

    Returns
    -------
    str
        The code, in lower case, without script and region.

    Raises
    ------
    UserError
        If there is no such language; the message suggests the closest.
    """
    wanted = _plain(str(tag).strip().strip("<|>"))
    names = _codes_by_name()
    known = {*names.values(), *_CLDR_CODES}
    code = wanted if wanted in known else names.get(wanted)  # "ga" is Irish, not the language named Ga
    if code is None:
        primary = wanted.replace("_", "-").partition("-")[0]
        code = primary if primary in known else get_global("language_aliases").get(primary, "").partition("_")[0]
        if code not in known:
            hint = did_you_mean(wanted, [*names, *known])
            raise UserError(
                f"'{tag}' is not a language; use an ISO 639 code or an English name (en, eng, English).{hint}"
            )
    return WHISPER_CODES.get(code, code)


def is_language(tag: str) -> bool:
    """Whether `tag` is a known language."""
    try:
        return bool(normalise_language(tag))
    except UserError:
        return False


def has_code_form(tag: str) -> bool:
    """Whether `tag` has the form of an ISO 639-3 code; there are more of them than CLDR has names."""
    return re.fullmatch("[a-z]{3}", tag) is not None


def normalise_or_keep(tag: str | None) -> str | None:
    """Return the code of a language; an unknown tag is returned unchanged, for the model or the normaliser to handle."""
    try:
        return tag if tag is None else normalise_language(tag)
    except UserError:
        return tag


def language_name(code: str) -> str:
    """Return the English name of a language, or the code itself if it has none."""
    return _MORE.get(code, "").title() or Locale("en").languages.get(_CLDR_CODES.get(code, code), code)


@functools.cache
def number_separators(language: str) -> tuple[str, str]:
    """Return the decimal and the thousands separator of a language, such as `.` and `,` in English."""
    try:
        locale = Locale.parse(_CLDR_CODES.get(language, language))
        return get_decimal_symbol(locale), get_group_symbol(locale)
    except (UnknownLocaleError, ValueError):
        return ".", ","
