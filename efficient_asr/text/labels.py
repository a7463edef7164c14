"""Character labels of CTC models."""

from __future__ import annotations

from collections.abc import Iterable


class CharacterLabels:
    """The output alphabet of a CTC model: index 0 is the blank, the others are single characters.

    Unlike in the papers' recipes, there are no begin and end symbols: CTC never uses them.

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
        """Collect the characters of the training texts, in code point order; a space is always included."""
        seen = {" "}
        for text in texts:
            seen.update(text)
        return cls(sorted(seen))

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """Return label indices; characters outside the alphabet are skipped (`unknown` lists them)."""
        return [self.index[character] for character in text if character in self.index]

    def encode_row(self, row: dict) -> list[int]:
        """Return the label indices of an utterance's text."""
        return self.encode(row["text"])

    def unknown(self, text: str) -> set[str]:
        """Return the characters of `text` that are not in the alphabet."""
        return set(text) - set(self.index)

    def decode(self, indices: Iterable[int]) -> str:
        """Join labels (blanks and repeats already removed) into text with single spaces."""
        return " ".join("".join(self.characters[i - 1] for i in indices).split())

    @property
    def vocabulary(self) -> list[str]:
        """All outputs by index, with the blank as an empty string."""
        return ["", *self.characters]
