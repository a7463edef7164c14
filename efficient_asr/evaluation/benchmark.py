"""Benchmark: fixed utterances with normalised references."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_asr.data import Row, Rows, read_manifest
from efficient_asr.inference.transcriber import MANIFEST
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError


@dataclass
class Benchmark:
    """Fixed utterances with normalised references.

    Attributes
    ----------
    corpus, split : str
        Names shown in tables.
    rows : Rows
        Utterances with `text` as in the manifest; a list of dicts is also accepted.
    normaliser : str
        Normaliser for both references and hypotheses. None for Whisper's own: `whisper` if everything is English, otherwise
        `multilingual`.
    language : str
        Language of utterances without a `language`.
    language_unknown : bool
        Whether `language` is a guess for utterances without one.
    task : str
        `transcribe` or `translate`. With `translate`, the references are the rows' English `translation`, BLEU is also
        computed, and utterances without a translation are skipped.
    """

    corpus: str
    split: str
    rows: Rows
    normaliser: str | None = "plain"
    language: str = "en"
    task: str = "transcribe"
    language_unknown: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Rows):
            self.rows = Rows.of(self.rows)
        if self.task == "translate":
            if importlib.util.find_spec("sacrebleu") is None:
                raise UserError("task: BLEU of translations needs sacrebleu: pip install 'efficient_asr[translation]'")
            known = [i for i, row in enumerate(self.rows) if row.get("translation")]
            if not known:
                raise UserError(
                    f"task: no utterance of {self.corpus}/{self.split} has a `translation` as reference; some corpora "
                    "provide translations through an option (see corpus_options)"
                )
            if len(known) < len(self.rows):
                without = len(self.rows) - len(known)
                print(
                    f"{self.corpus}/{self.split}: {without} of {len(self.rows)} utterances have no `translation`; skipped"
                )
                self.rows = self.rows.select(known)
        if self.normaliser is None:
            languages = (row.get("language") or self.language for row in self.rows)
            self.normaliser = "whisper" if self.task == "translate" else whisper_normaliser(languages)
            if self.language_unknown and self.task != "translate":
                print(
                    f"{self.corpus}/{self.split}: no language is given; texts are normalised as English. For other languages, "
                    "give --language, or a column `language`"
                )

    @classmethod
    def from_manifest(
        cls,
        path: Path,
        corpus: str | None = None,
        split: str | None = None,
        normaliser: str | None = "plain",
        columns: dict[str, Any] | None = None,
        skip_bad: bool = False,
        skipped_file: Path | None = None,
        check_audio: str = "header",
        cache: Path | None = None,
        language: str | None = None,
        task: str = "transcribe",
    ) -> Benchmark:
        """Read a manifest (see `read_manifest`); `corpus` and `split` default to the names of its folder and file."""
        if normaliser is not None:
            get_normaliser(normaliser)
        path = Path(path)
        rows = read_manifest(path, columns, True, skip_bad, skipped_file, check_audio, cache=cache)
        unnamed = "en" if language in (None, MANIFEST) else normalise_or_keep(language)
        unknown = language in (None, MANIFEST) and not all(row.get("language") for row in rows)
        return cls(corpus or path.absolute().parent.name, split or path.stem, rows, normaliser, unnamed, task, unknown)

    def normalise(self, text: str, row: Row) -> str:
        """Normalise a text using the rules for its utterance's language, or for English when translating."""
        language = "en" if self.task == "translate" else row.get("language") or self.language
        return get_normaliser(self.normaliser)(text, language)

    def reference(self, row: Row) -> str:
        """Return the expected text, not normalised."""
        return row["translation"] if self.task == "translate" else row["text"]

    @property
    def references(self) -> list[str]:
        """Normalised references, in the order of the rows."""
        return [self.normalise(self.reference(row), row) for row in self.rows]

    @property
    def hash(self) -> str:
        """Hash of all utterances, references and durations, and of the normaliser."""
        content = [
            [row["id"], text, round(row["duration"], 2), *([row["offset"]] if "offset" in row else [])]
            for row, text in zip(self.rows, self.references, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.normaliser, sorted(content)]).encode()).hexdigest()[:16]
