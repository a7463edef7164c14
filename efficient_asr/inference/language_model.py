"""Language models for CTC: an n-gram model of kenlm in SpeechBrain's beam search, and whether it fits the alphabet."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from efficient_asr.utils.errors import UserError

MOST_WORDS = 50_000  # of a language model that are looked at
NEEDED, GOOD = 0.5, 0.9  # share of its words that the alphabet must spell, and should
WHY_NOT = (
    "decoding with a language model needs kenlm (and a C++ compiler to install it): pip install 'efficient_asr[lm]'"
)


def kenlm_is_here() -> bool:
    """Whether language models can be used."""
    return importlib.util.find_spec("kenlm") is not None and importlib.util.find_spec("pygtrie") is not None


def words_of(path: str) -> Iterator[str]:
    """Yield the words of an ARPA file or a kenlm binary, without markers such as <s>; none where they cannot be told."""
    if not Path(path).stat().st_size:
        return
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else open(path, "rb") as file:
        arpa = file.read(4096).lstrip().startswith(b"\\data\\")
        file.seek(0)
        if not arpa and zipped:
            return
        if not arpa:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                place = content.rfind(b"<unk>\0")  # a binary ends with its words, in this order
                while 0 <= place < len(content):
                    end = content.find(b"\0", place)
                    word, place = content[place : end if end >= 0 else len(content)], end + 1 if end >= 0 else -1
                    if not word.startswith(b"<"):
                        yield word.decode("utf-8", errors="replace")
            return
        inside = False
        for line in file:
            if line.startswith(b"\\"):
                if inside:
                    return
                inside = line.startswith(b"\\1-grams:")
            elif inside and line.strip():
                cells = re.split(rb"[\t ]+", line.strip())
                if len(cells) > 1 and not cells[1].startswith(b"<"):
                    yield cells[1].decode("utf-8", errors="replace")


def share_spelled(words: list[str], alphabet: set[str]) -> float:
    """Return the share of words all of whose characters are in an alphabet."""
    return sum(set(word) <= alphabet for word in words) / max(1, len(words))


class LanguageModel:
    """CTC beam search with an n-gram language model of kenlm, SpeechBrain's searcher.

    Arguments
    ---------
    path : str
        ARPA file or kenlm binary.
    labels : list of str
        Outputs of the model by index, the blank as an empty string.
    alpha : float
        Weight of the language model.
    beta : float
        Reward for each word.
    beam_size : int
        Hypotheses kept a frame.
    case : str
        `lower` or `upper`: how the language model writes its words.
    check : bool
        See that its words can be spelled with the labels.

    Raises
    ------
    UserError
        Where the file or kenlm is missing, the file is not a language model, or most of its words cannot be spelled with the
        labels: it would make every transcript worse.
    """

    def __init__(
        self,
        path: str,
        labels: list[str],
        alpha: float = 0.5,
        beta: float = 1.0,
        beam_size: int = 100,
        case: str = "lower",
        check: bool = True,
    ) -> None:
        path = str(path)
        if not Path(path).is_file():
            raise UserError(f"lm_path: no file at {path}")
        if case not in ("lower", "upper"):
            raise UserError(f"lm_case: '{case}' is not lower or upper")
        if not kenlm_is_here():
            raise UserError(WHY_NOT)
        written = self._spelling(labels, case)
        if check:
            self._check_words(path, labels, case)
        from speechbrain.decoders.ctc import CTCBeamSearcher

        try:
            self.searcher = CTCBeamSearcher(
                blank_index=0,
                vocab_list=written,
                space_token=" ",
                kenlm_model_path=path,
                alpha=alpha,
                beta=beta,
                beam_size=beam_size,
                # SpeechBrain's penalty for unknown words has a weight of its own; without a model there is none.
                unk_score_offset=-10.0 if alpha else 0.0,
            )
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"lm_path: {path} is not a language model that kenlm can read ({error})") from None
        # What the searcher writes, in the model's own letters.
        self._back = {ord(a): b for a, b in zip(written, labels, strict=True) if len(a) == 1 and a != b}
        self.config = {"path": Path(path).name, "alpha": alpha, "beta": beta, "beam_size": beam_size}

    def decode(self, log_probs: torch.Tensor, frame_lengths: torch.Tensor) -> list[str]:
        """Return the best text for each of [batch, frames, labels] with lengths [batch]."""
        texts = []
        for row, length in zip(log_probs.cpu(), frame_lengths.tolist(), strict=True):
            # One at a time on its own frames: the searcher would otherwise see padding.
            best = self.searcher(row[None, :length], torch.ones(1))[0][0].text if length else ""
            texts.append(" ".join(best.translate(self._back).split()))
        return texts

    @staticmethod
    def _spelling(labels: list[str], case: str) -> list[str]:
        """Return the labels as a language model of this case writes them; those that case would make equal or longer stay."""
        changed = [label.upper() if case == "upper" else label.lower() for label in labels]
        taken = {label for label in labels if label}
        return [
            new if len(new) == len(old) and (new == old or new not in taken) else old
            for new, old in zip(changed, labels, strict=True)
        ]

    @classmethod
    def _check_words(cls, path: str, labels: list[str], case: str) -> None:
        """Refuse a language model whose words the labels cannot spell, and warn of one with many such words."""
        words = list(itertools.islice(words_of(path), MOST_WORDS))
        if not words:
            return
        shares = {each: share_spelled(words, {*cls._spelling(labels, each)}) for each in ("lower", "upper")}
        if shares[case] >= GOOD:
            return
        unspelled = [word for word in words if not set(word) <= {*cls._spelling(labels, case)}][:3]
        said = (
            f"lm_path: {100 * shares[case]:.0f} % of the words of {path} can be spelled with this model's labels in {case} case "
            f"(not {', '.join(unspelled)})"
        )
        other = "upper" if case == "lower" else "lower"
        if shares[case] < NEEDED:
            advice = (
                f"it is written in {other} case: --lm_case {other}"
                if shares[other] > max(NEEDED, shares[case])
                else "it is of another alphabet or language; take one of words as the model writes them"
            )
            raise UserError(f"{said}; {advice}")
        hint = f"; --lm_case {other} would fit better" if shares[other] > shares[case] else ""
        print(f"{said}{hint}")
