"""Word and character errors, confidence intervals, and a paired significance test. jiwer computes the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np


@dataclass(frozen=True)
class Errors:
    """Errors of one utterance.

    Attributes
    ----------
    substitutions, deletions, insertions : int
        Counts in the alignment.
    reference_length : int
        Number of words (or characters) in the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference_length: int

    @property
    def total(self) -> int:
        """Total number of errors."""
        return self.substitutions + self.deletions + self.insertions


def count_errors(references: list[str], hypotheses: list[str], characters: bool = False) -> list[Errors]:
    """Align each hypothesis with its reference.

    Arguments
    ---------
    references, hypotheses : list of str
        Normalised texts, in the same order. Against an empty reference every word is an insertion.
    characters : bool
        Whether to count characters instead of words.

    Raises
    ------
    ValueError
        If the lists differ in length.
    """
    process = jiwer.process_characters if characters else jiwer.process_words
    errors = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        if not reference or not hypothesis:  # jiwer requires words on both sides
            length = len(reference) if characters else len(reference.split())
            extra = len(hypothesis) if characters else len(hypothesis.split())
            errors.append(Errors(0, length, extra, length))
            continue
        out = process(reference, hypothesis)
        length = out.hits + out.substitutions + out.deletions
        errors.append(Errors(out.substitutions, out.deletions, out.insertions, length))
    return errors


def repeated_ngrams(text: str, size: int = 5) -> int:
    """Return how many runs of `size` words of a text occurred in it before: a measure of hallucination (arXiv 2311.00430)."""
    words = text.split()
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(runs) - len({*runs})


def error_rate_percent(errors: list[Errors]) -> float | None:
    """Pooled error rate in percent; None if all references are empty."""
    length = sum(e.reference_length for e in errors)
    return 100.0 * sum(e.total for e in errors) / length if length else None


def _resampled_rates(counts: np.ndarray, lengths: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return bootstrap samples, [samples], of 100 * sum(`counts`) / sum(`lengths`); both are [utterances]."""
    rng, rates = np.random.default_rng(seed), np.empty(samples)
    for i in range(samples):  # one at a time, so that memory does not grow with utterances * samples
        drawn = rng.integers(0, len(counts), len(counts))
        rates[i] = 100.0 * counts[drawn].sum() / max(lengths[drawn].sum(), 1)
    return rates


def bootstrap_ci95(errors: list[Errors], samples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % confidence interval of the pooled error rate in percent, by resampling utterances with replacement.

    Source: Bisani, Ney: "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004).
    """
    totals = np.array([e.total for e in errors], dtype=float)
    lengths = np.array([e.reference_length for e in errors], dtype=float)
    if not lengths.sum():
        return None
    rates = _resampled_rates(totals, lengths, samples, seed)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def compared(before: list[Errors], after: list[Errors]) -> dict[str, Any]:
    """Return the WER after a change and its difference from before with a 95 % interval, as results of comparisons keep them.

    Arguments
    ---------
    before, after : list of Errors
        See `paired_bootstrap`.
    """
    test = paired_bootstrap(before, after)
    return {
        "wer_percent": error_rate_percent(after), "difference_percent": test["difference_percent"],
        "ci95_percent": [test["low_percent"], test["high_percent"]],
    }  # fmt: skip


def paired_bootstrap(a: list[Errors], b: list[Errors], samples: int = 10000, seed: int = 0) -> dict[str, float]:
    """Test whether two systems differ on the same utterances.

    Arguments
    ---------
    a, b : list of Errors
        Errors of both systems on the same utterances in the same order.
    samples : int
        Number of bootstrap samples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    dict
        `difference_percent` (WER of b minus WER of a, absolute), its 95 % confidence interval `low_percent`, `high_percent`,
        and the two-sided `p_value`.

    Raises
    ------
    ValueError
        If the references differ.
    """
    lengths = np.array([e.reference_length for e in a], dtype=float)
    if [e.reference_length for e in a] != [e.reference_length for e in b]:
        raise ValueError("the two systems were not scored on the same references")
    difference = np.array([y.total - x.total for x, y in zip(a, b, strict=True)], dtype=float)
    deltas = _resampled_rates(difference, lengths, samples, seed)
    low, high = np.percentile(deltas, [2.5, 97.5])
    tail = min((deltas <= 0).mean(), (deltas >= 0).mean())
    return {
        "difference_percent": float(100.0 * difference.sum() / lengths.sum()),
        "low_percent": float(low),
        "high_percent": float(high),
        "p_value": float(min(1.0, 2 * tail)),
    }
