"""Language models for CTC: kenlm n-gram models in SpeechBrain's beam search, checked against the model's alphabet."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import itertools
import mmap
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import file_state

MOST_WORDS = 50_000  # of a language model that are checked
NEEDED, GOOD = 0.5, 0.9  # minimum and recommended share of its words that the alphabet can spell
WHY_NOT = (
    "decoding with a language model needs kenlm (and a C++ compiler to install it): pip install 'efficient_asr[lm]'"
)


def kenlm_is_here() -> bool:
    """Whether the packages for language models are installed."""
    return importlib.util.find_spec("kenlm") is not None and importlib.util.find_spec("pygtrie") is not None


@contextlib.contextmanager
def _quiet_native_stderr() -> Iterator[None]:
    """Discard what native code writes to standard error: kenlm prints a banner and a line of stars for every ARPA file.

    kenlm's errors are raised as exceptions, and are not affected.
    """
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def words_of(path: str) -> Iterator[str]:
    """Yield the words of an ARPA file or a kenlm binary, without markers such as <s>; nothing if the format is unknown."""
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
                place = content.rfind(b"<unk>\0")  # a binary ends with its words, starting with <unk>
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
    """Return the share of words that can be spelled with the alphabet."""
    return sum(set(word) <= alphabet for word in words) / max(1, len(words))


class LanguageModel:
    """CTC beam search with a kenlm n-gram language model, using SpeechBrain's searcher.

    Arguments
    ---------
    path : str
        ARPA file or kenlm binary.
    labels : list of str
        Labels of the model's outputs by index; the blank is an empty string.
    alpha : float
        Weight of the language model.
    beta : float
        Reward per word.
    beam_size : int
        Hypotheses kept per frame.
    case : str
        `lower` or `upper`: case of the words in the language model.
    check : bool
        Whether to check that its words can be spelled with the labels.

    Raises
    ------
    UserError
        If the file or kenlm is missing, the file is not a language model, or most of its words cannot be spelled with the
        labels, so that it would degrade every transcript.
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
            raise UserError(f"lm_case: invalid value '{case}'; use 'lower' or 'upper'")
        if not kenlm_is_here():
            raise UserError(WHY_NOT)
        written = self._spelling(labels, case)
        if check:
            self._check_words(path, labels, case)
        from speechbrain.decoders.ctc import CTCBeamSearcher

        try:
            with _quiet_native_stderr():
                self.searcher = CTCBeamSearcher(
                    blank_index=0,
                    vocab_list=written,
                    space_token=" ",
                    kenlm_model_path=path,
                    alpha=alpha,
                    beta=beta,
                    beam_size=beam_size,
                    # SpeechBrain does not scale the penalty for unknown words by alpha, so it is disabled separately.
                    unk_score_offset=-10.0 if alpha else 0.0,
                )
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"lm_path: {path} is not a language model that kenlm can read ({error})") from None
        # Maps the searcher's output back to the model's own characters.
        self._back = {ord(a): b for a, b in zip(written, labels, strict=True) if len(a) == 1 and a != b}
        self.config = {"path": Path(path).name, "alpha": alpha, "beta": beta, "beam_size": beam_size}
        self.identity = f"{self.config} {case} {file_state(path)}"  # of the transcripts that depend on it

    def decode(self, log_probs: torch.Tensor, frame_lengths: torch.Tensor) -> list[str]:
        """Return the best text for each utterance of `log_probs` [batch, frames, labels] with `frame_lengths` [batch]."""
        texts = []
        for row, length in zip(log_probs.cpu(), frame_lengths.tolist(), strict=True):
            # One utterance at a time, without padding: the searcher would otherwise decode padded frames.
            best = self.searcher(row[None, :length], torch.ones(1))[0][0].text if length else ""
            texts.append(" ".join(best.translate(self._back).split()))
        return texts

    @staticmethod
    def _spelling(labels: list[str], case: str) -> list[str]:
        """Return the labels in the language model's case; keep labels that would collide with others or grow longer."""
        changed = [label.upper() if case == "upper" else label.lower() for label in labels]
        taken, counts = {label for label in labels if label}, Counter(changed)
        return [
            new if len(new) == len(old) and (new == old or (new not in taken and counts[new] == 1)) else old
            for new, old in zip(changed, labels, strict=True)
        ]

    @classmethod
    def _check_words(cls, path: str, labels: list[str], case: str) -> None:
        """Reject a language model if the labels cannot spell most of its words; warn if many words are affected."""
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
                f"it is written in {other} case: use --lm_case {other}"
                if shares[other] > max(NEEDED, shares[case])
                else "it uses another alphabet or language; choose one whose words are spelled like the model's output"
            )
            raise UserError(f"{said}; {advice}")
        hint = f"; --lm_case {other} would fit better" if shares[other] > shares[case] else ""
        print(f"{said}{hint}", file=sys.stderr)
