"""The arithmetic of routing against small examples that can be done by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from efficient_asr.techniques.decider.analysis import (
    Costs,
    Curve,
    Pair,
    area_under_roc,
    balanced_accuracy,
    bootstrap,
    curve,
    oracle_curve,
    performance_gap_recovered,
    threshold_for,
)
from efficient_asr.techniques.decider.data import pgr_at
from efficient_asr.utils.errors import UserError


def make_pair(small: list[int], large: list[int], words: int = 10) -> Pair:
    def records(errors: list[int], macs_g: float) -> list[dict]:
        return [
            {"id": str(i), "errors": e, "macs_g": macs_g, "time_s": macs_g / 10, "reference": "x", "reference_words": words,
             "duration": 1.0} for i, e in enumerate(errors)
        ]  # fmt: skip

    count = len(small)
    return Pair(
        [str(i) for i in range(count)],
        np.ones(count),
        np.full(count, float(words)),
        records(small, 1.0),
        records(large, 9.0),
    )


def plain_costs(pair: Pair) -> Costs:
    return Costs(*pair.values("macs_g"))


def test_recovered_gap_of_a_cascade_by_hand() -> None:
    """Errors of the small model: 9 of 40 words; of the large one: 4; the oracle makes 3, at a mean cost of 5."""
    pair = make_pair([3, 0, 5, 1], [1, 0, 1, 2])

    def records(errors: list[int], macs_g: list[float]) -> list[dict]:
        return [
            {"id": str(i), "errors": e, "macs_g": cost} for i, (e, cost) in enumerate(zip(errors, macs_g, strict=True))
        ]

    assert pgr_at(pair, records([1, 0, 1, 1], [9, 1, 9, 1])) == pytest.approx(1.0)
    # at random, half of the utterances on each: 6.5 errors; the oracle makes 3
    assert pgr_at(pair, records([3, 0, 1, 2], [1, 1, 9, 9])) == pytest.approx((6.5 - 6) / (6.5 - 3))
    assert pgr_at(pair, records([3, 0, 5, 1], [1, 1, 1, 1])) is None  # all small: the oracle cannot do anything else
    assert pgr_at(pair, records([1, 0, 1, 1], [9, 1, 9, 1])[:3]) is None


def test_curve_by_hand() -> None:
    pair = make_pair([3, 0, 5, 1], [1, 0, 1, 2])
    found = curve(pair, np.array([0.2, 0.1, 0.9, 0.5]), plain_costs(pair))
    assert found.wer_percent.tolist() == pytest.approx([100 * e / 40 for e in (9, 5, 6, 4, 4)])
    assert found.cost.tolist() == pytest.approx([1, 3, 5, 7, 9]) and found.rate.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_the_oracle_beats_every_choice() -> None:
    pair = make_pair([3, 0, 5, 1, 2], [1, 0, 1, 2, 2])
    best = oracle_curve(pair, *pair.values("macs_g"))
    small, large = pair.values("errors")
    for chosen in itertools.product([False, True], repeat=5):
        errors, sent = np.where(chosen, large, small).sum(), sum(chosen)
        cost = np.where(chosen, 9.0, 1.0).mean()
        assert 100 * errors / 50 >= float(best.at(np.array([cost]))[0]) - 1e-9, sent
    assert best.rate[-1] == 0.4  # only the two with a gain


def test_gain_closed_is_one_for_the_oracle_and_none_where_nothing_is_gained() -> None:
    pair = make_pair([3, 0, 5, 1, 2, 0], [1, 0, 1, 1, 2, 0])
    small, large = pair.values("macs_g")
    assert performance_gap_recovered(pair, pair.gains, plain_costs(pair), small, large) == pytest.approx(1.0)
    worst = performance_gap_recovered(pair, -pair.gains, plain_costs(pair), small, large)
    assert worst < 0
    same = make_pair([1, 2], [1, 2])
    assert performance_gap_recovered(same, np.zeros(2), plain_costs(same), *same.values("macs_g")) is None


def test_random_scores_close_nothing_on_average() -> None:
    rng = np.random.default_rng(0)
    pair = make_pair(rng.integers(0, 4, 60).tolist(), rng.integers(0, 2, 60).tolist())
    values = [
        performance_gap_recovered(pair, rng.random(60), plain_costs(pair), *pair.values("macs_g")) for _ in range(300)
    ]
    assert abs(np.mean(values)) < 0.02


def test_the_order_decides_what_is_paid() -> None:
    small, large = np.array([2.0]), np.array([20.0])
    costs = {
        order: Costs.of(order, small, large, 1.5, 17.0, 0.1)
        for order in ("audio", "encoder", "transcript", "small_model", "large_encoder")
    }
    assert {order: (float(c.easy[0]), float(c.hard[0])) for order, c in costs.items()} == {
        "audio": (2.1, 20.1),
        "encoder": (2.1, 21.6),
        "transcript": (2.1, 22.1),
        "small_model": (2.1, 22.1),
        "large_encoder": (pytest.approx(19.1), 20.1),
    }


def test_the_papers_order_saves_next_to_nothing() -> None:
    """Half of it easy; small 197.5 GMACs with 25 tokens, 172.1 of them its encoder; tiny 21.1."""
    tiny, small = np.full(2, 21.1), np.full(2, 197.5)
    share = {
        order: 1
        - (Costs.of(order, tiny, small, 18.5, 172.1).easy[0] + Costs.of(order, tiny, small, 18.5, 172.1).hard[0])
        / 2
        / 197.5
        for order in ("encoder", "large_encoder", "transcript")
    }
    assert share == pytest.approx({"large_encoder": 0.011, "encoder": 0.400, "transcript": 0.393}, abs=0.001)


def test_area_under_roc_counts_pairs() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))
    assert area_under_roc(scores, np.ones(40, dtype=bool)) is None


def test_balanced_accuracy_of_a_constant_is_a_coin() -> None:
    positive = np.array([True, False, False, False])
    assert balanced_accuracy(np.zeros(4, dtype=bool), positive) == 0.5
    assert balanced_accuracy(positive, positive) == 1.0
    assert balanced_accuracy(positive, np.zeros(4, dtype=bool)) is None


@pytest.mark.parametrize(("key", "value", "sent"), [
    ("calibrate_large_share", 0.0, 0), ("calibrate_large_share", 0.5, 2), ("calibrate_large_share", 1.0, 4),
    ("calibrate_macs_g", 5.5, 2), ("calibrate_macs_g", 1.0, 0),
    ("calibrate_wer_percent", 12.5, 1), ("calibrate_wer_percent", 10.0, 3),
])  # fmt: skip
def test_calibration_meets_the_wish(key: str, value: float, sent: int) -> None:
    pair, scores = make_pair([3, 0, 5, 1], [1, 0, 1, 2]), np.array([0.2, 0.1, 0.9, 0.5])
    threshold = threshold_for(pair, scores, plain_costs(pair), key, value)
    assert int((scores > threshold).sum()) == sent


@pytest.mark.parametrize(("key", "value", "message"), [
    ("calibrate_large_share", 1.5, "between 0 and 1"), ("calibrate_macs_g", 0.5, "less than the 1.000"),
    ("calibrate_wer_percent", 1.0, "the best is 10.00 %"),
])  # fmt: skip
def test_wishes_that_cannot_be_met(key: str, value: float, message: str) -> None:
    pair = make_pair([3, 0, 5, 1], [1, 0, 1, 2])
    with pytest.raises(UserError, match=message):
        threshold_for(pair, np.array([0.2, 0.1, 0.9, 0.5]), plain_costs(pair), key, value)


def test_bootstrap_holds_the_mean() -> None:
    pairs = [make_pair(list(range(30)), [0] * 30), make_pair([2] * 10, [0] * 10)]
    low, high = bootstrap(pairs, lambda group, rows: float(pairs[group].gains[rows].mean()), 300)
    assert low < (14.5 + 2) / 2 < high and high - low < 4


def test_pairs_are_read_and_mismatches_named(tmp_path: Path) -> None:
    pair = make_pair([1, 2], [0, 2])
    for name, rows in (("small", pair.small), ("large", pair.large)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Pair.read(tmp_path / "small.jsonl", tmp_path / "large.jsonl")
    assert read.ids == ["0", "1"] and read.gains.tolist() == [1, 0]
    with pytest.raises(UserError, match="no records at"):
        Pair.read(tmp_path / "small.jsonl", tmp_path / "none.jsonl")
    (tmp_path / "large.jsonl").write_text(json.dumps(pair.large[0]) + "\n")
    with pytest.raises(UserError, match="different utterances"):
        Pair.read(tmp_path / "small.jsonl", tmp_path / "large.jsonl")
    (tmp_path / "large.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="jsonl:1 is not a record"):
        Pair.read(tmp_path / "small.jsonl", tmp_path / "large.jsonl")


def test_calibration_keeps_its_promise_among_equal_scores() -> None:
    pair, scores = make_pair([1, 1, 1, 5], [0, 0, 0, 5], words=4), np.array([1.0, 1.0, 1.0, 0.0])
    threshold = threshold_for(pair, scores, plain_costs(pair), "calibrate_wer_percent", 45.0)
    assert int((scores > threshold).sum()) == 3
    threshold = threshold_for(pair, scores, plain_costs(pair), "calibrate_macs_g", 4.0)
    assert int((scores > threshold).sum()) == 0


def test_a_router_that_is_too_expensive_gains_nothing() -> None:
    """Budgets too small for the router itself count as random choice."""
    pair = make_pair([3, 0, 5, 1, 2, 0], [1, 0, 1, 1, 2, 0])
    small, large = pair.values("macs_g")
    gains = {
        router: performance_gap_recovered(pair, pair.gains, Costs(small + router, large + router), small, large)
        for router in (0.0, 0.5, 4.0, 100.0)
    }
    assert gains[0.0] == pytest.approx(1.0) and 1.0 > gains[0.5] > gains[4.0] > -1.0
    assert gains[100.0] == 0.0


def test_a_curve_whose_cost_falls_is_read_at_the_running_maximum() -> None:
    falling = Curve(np.array([1.0, 3.0, 2.0, 5.0]), np.array([40.0, 30.0, 20.0, 10.0]), np.linspace(0, 1, 4))
    found = falling.at(np.array([2.0, 4.0, 9.0]))
    assert found.tolist() == pytest.approx([35.0, 15.0, 10.0]) and np.isnan(falling.at(np.array([0.5]))[0])
