from __future__ import annotations

import random

import jiwer
import numpy as np
import pytest

from efficient_asr.evaluation.wer import (
    Errors,
    bootstrap_ci95,
    compared,
    count_errors,
    error_rate_percent,
    paired_bootstrap,
)


def test_counts_of_known_alignments() -> None:
    pairs = [
        ("a b c", "a x c", (1, 0, 0)),
        ("a b", "a b c d", (0, 0, 2)),
        ("a b c", "", (0, 3, 0)),
        ("", "x y", (0, 0, 2)),
    ]
    errors = count_errors([p[0] for p in pairs], [p[1] for p in pairs])
    assert [(e.substitutions, e.deletions, e.insertions) for e in errors] == [p[2] for p in pairs]
    assert error_rate_percent(errors) == pytest.approx(100 * 8 / 8)


def test_agrees_with_jiwer_on_random_texts() -> None:
    rng = random.Random(0)
    texts = [[" ".join(rng.choices("abcde", k=rng.randint(1, 12))) for _ in range(200)] for _ in range(2)]
    assert error_rate_percent(count_errors(*texts)) == pytest.approx(100 * jiwer.wer(*texts))
    assert error_rate_percent(count_errors(*texts, characters=True)) == pytest.approx(100 * jiwer.cer(*texts))


def test_no_reference_words_means_no_rate() -> None:
    errors = count_errors([""], ["a"])
    assert error_rate_percent(errors) is None and bootstrap_ci95(errors) is None


def test_unequal_lists() -> None:
    with pytest.raises(ValueError, match="argument"):
        count_errors(["a"], [])


def test_bootstrap_interval_covers_the_truth() -> None:
    """Of 100 test sets drawn with 20 % errors, about 95 intervals must hold 20."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        errors = [Errors(int(n), 0, 0, 10) for n in rng.binomial(10, 0.2, 150)]
        low, high = bootstrap_ci95(errors, samples=500, seed=seed)
        hits += low <= 20 <= high
    assert 88 <= hits <= 100


def test_paired_test_tells_difference_from_noise() -> None:
    rng = np.random.default_rng(1)
    base = rng.binomial(10, 0.2, 300)
    a = [Errors(int(n), 0, 0, 10) for n in base]
    worse = [Errors(int(n + (rng.random() < 0.3)), 0, 0, 10) for n in base]
    shuffled = [Errors(int(n), 0, 0, 10) for n in rng.permutation(base)]
    different, same = paired_bootstrap(a, worse), paired_bootstrap(a, shuffled)
    assert different["p_value"] < 0.001 and different["low_percent"] > 0
    assert same["p_value"] > 0.05 and same["difference_percent"] == pytest.approx(0)
    assert paired_bootstrap(a, a)["p_value"] == 1.0
    with pytest.raises(ValueError, match="not scored on the same references"):
        paired_bootstrap(a, [Errors(0, 0, 0, 9)] * 300)


def test_a_comparison_is_that_of_the_errors() -> None:
    before, after = [Errors(1, 0, 0, 5)] * 8, [Errors(1, 1, 0, 5)] * 4 + [Errors(0, 0, 0, 5)] * 4
    found, test = compared(before, after), paired_bootstrap(before, after)
    assert found["wer_percent"] == 100 * 8 / 40 and found["difference_percent"] == 0.0
    assert found["ci95_percent"] == [test["low_percent"], test["high_percent"]] and found["ci95_percent"][0] < 0
    assert compared(before, before)["ci95_percent"] == [0.0, 0.0]


def test_paired_interval_and_p_value_are_those_of_the_binomial_distribution() -> None:
    """With an error more in 30 of 100 utterances, the resampled number of errors is binomial: 21 to 39 in 95 % of samples."""
    a, b = [Errors(0, 0, 0, 10)] * 100, [Errors(1, 0, 0, 10)] * 30 + [Errors(0, 0, 0, 10)] * 70
    found = paired_bootstrap(a, b)
    assert found["difference_percent"] == pytest.approx(3.0)
    assert found["low_percent"] == pytest.approx(2.1, abs=0.11) and found["high_percent"] == pytest.approx(
        3.9, abs=0.11
    )
    # one error more in ten utterances: no error in a sample with probability 0.9 ** 10, counted on both sides
    found = paired_bootstrap([Errors(0, 0, 0, 10)] * 10, [Errors(1, 0, 0, 10)] + [Errors(0, 0, 0, 10)] * 9)
    assert found["p_value"] == pytest.approx(2 * 0.9**10, abs=0.03)
