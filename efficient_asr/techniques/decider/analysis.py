"""Analysis of routing between a small and a large model, from the records of both models on every utterance.

`recipes/decider/label.py` writes one file per model; two files for the same manifest form a `Pair`. Given a pair and the
scores of any router, this module computes exactly, without running a model again: WER and cost at every threshold, those of
choosing at random and of an oracle, the performance gap recovered (PGR) at equal cost, and the threshold for a requested
share, budget or WER.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficient_asr.techniques.decider.router import AFTER_SMALL
from efficient_asr.utils.errors import UserError

HOW = "run recipes/decider/label.py with both models on this manifest first"


@dataclass
class Pair:
    """Records of two models on the same utterances; arrays have shape [utterances].

    Attributes
    ----------
    ids : list of str
        Utterance ids, in the order of the small model's file.
    durations : numpy.ndarray
        Duration in seconds.
    words : numpy.ndarray
        Number of reference words.
    small, large : list of dict
        Records of the small and of the large model.
    """

    ids: list[str]
    durations: np.ndarray
    words: np.ndarray
    small: list[dict[str, Any]]
    large: list[dict[str, Any]]

    @classmethod
    def read(cls, small: Path, large: Path) -> Pair:
        """Read two files written by `recipes/decider/label.py`.

        Raises
        ------
        UserError
            If a file is missing, or the files contain different utterances.
        """
        records = [read_records(path) for path in (small, large)]
        ids = list(records[0])
        if set(ids) != set(records[1]):
            odd = sorted(set(ids) ^ set(records[1]))
            raise UserError(f"{small} and {large} contain different utterances (for example {odd[0]}); {HOW}")
        for name in ids:
            if records[0][name]["reference"] != records[1][name]["reference"]:
                raise UserError(f"{small} and {large} have different references for '{name}'; {HOW}")
        rows = [[of[name] for name in ids] for of in records]
        durations, words = (
            np.array([row[key] for row in rows[0]], dtype=float) for key in ("duration", "reference_words")
        )
        return cls(ids, durations, words, *rows)

    def values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers under `key` in the records of the small and of the large model.

        Raises
        ------
        UserError
            If the records do not have them.
        """
        found = tuple(np.array([row[key] for row in rows], dtype=float) for rows in (self.small, self.large))
        missing = np.flatnonzero(np.isnan(found).any(axis=0))  # None becomes NaN
        if len(missing):
            raise UserError(
                f"the record of '{self.ids[missing[0]]}' has no {key}: run recipes/decider/label.py again, without "
                "--count_macs False"
            )
        return found

    @property
    def gains(self) -> np.ndarray:
        """Errors of the small model minus those of the large."""
        small, large = self.values("errors")
        return small - large

    def select(self, rows: np.ndarray) -> Pair:
        """Return the utterances at the given indices; indices may repeat."""
        picked = [[of[i] for i in rows] for of in (self.small, self.large)]
        return Pair([self.ids[i] for i in rows], self.durations[rows], self.words[rows], *picked)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file written by `recipes/decider/label.py` and return its records by id.

    Raises
    ------
    UserError
        If the file is missing, empty or invalid.
    """
    if not Path(path).is_file():
        raise UserError(f"no records at {path}; {HOW}")
    records = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number} is not a record of recipes/decider/label.py") from None
    if not records:
        raise UserError(f"{path} contains no records; {HOW}")
    return records


@dataclass
class Costs:
    """Cost of each utterance on both routes: kept by the smaller model (`easy`) or sent on (`hard`); [utterances] each."""

    easy: np.ndarray
    hard: np.ndarray

    @classmethod
    def of(
        cls, order: str, small: np.ndarray, large: np.ndarray, small_encoder: float | np.ndarray = 0.0,
        large_encoder: float | np.ndarray = 0.0, router: float | np.ndarray = 0.0,
    ) -> Costs:  # fmt: skip
        """Return the costs for a router input: `audio`, `encoder`, `transcript`, `small_model` or `large_encoder` (`cascade.py`).

        Arguments
        ---------
        order : str
            Router input.
        small, large : numpy.ndarray
            Cost of the full models, [utterances].
        small_encoder, large_encoder : float or numpy.ndarray
            Cost of the encoders alone: a number if it is the same for every utterance.
        router : float or numpy.ndarray
            Cost of the router.
        """
        if order == "audio":
            return cls(small + router, large + router)
        if order == "encoder":
            return cls(small + router, large + small_encoder + router)
        if order in AFTER_SMALL:
            return cls(small + router, small + large + router)
        if order == "large_encoder":
            return cls(small + large_encoder + router, large + router)
        raise ValueError(order)


@dataclass
class Curve:
    """WER in percent against mean cost, as the number of utterances sent to the large model increases; [points] each."""

    cost: np.ndarray
    wer_percent: np.ndarray
    rate: np.ndarray

    def at(self, cost: np.ndarray) -> np.ndarray:
        """Return the WER at mean costs, linear between points; NaN below the first point, constant past the last.

        Measured times can decrease along the curve, if the small model took longer on an utterance than the large one. The
        running maximum of the cost is used instead.
        """
        return np.interp(cost, np.maximum.accumulate(self.cost), self.wer_percent, left=np.nan)


def curve(pair: Pair, scores: np.ndarray, costs: Costs) -> Curve:
    """Return the curve of a router that sends utterances to the large model one by one, highest score first."""
    order = np.argsort(-scores, kind="stable")
    small, large = pair.values("errors")
    errors = small.sum() - np.concatenate([[0.0], np.cumsum((small - large)[order])])
    cost = costs.easy.sum() + np.concatenate([[0.0], np.cumsum((costs.hard - costs.easy)[order])])
    count = len(order)
    return Curve(cost / count, 100 * errors / max(1.0, pair.words.sum()), np.arange(count + 1) / count)


def oracle_curve(pair: Pair, small: np.ndarray, large: np.ndarray) -> Curve:
    """Return the curve of an oracle that knows the errors: largest gains first, only positive gains, no router cost."""
    gains = pair.gains
    best = curve(pair, gains, Costs(small, large))
    used = int((gains > 0).sum()) + 1
    return Curve(best.cost[:used], best.wer_percent[:used], best.rate[:used])


def random_wer_percent(pair: Pair, small: np.ndarray, large: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the WER of choosing at random at mean costs: the straight line between always-small and always-large."""
    ends = [100 * values.sum() / max(1.0, pair.words.sum()) for values in pair.values("errors")]
    rates = np.clip((cost - small.mean()) / (large.mean() - small.mean()), 0.0, 1.0)
    return ends[0] + rates * (ends[1] - ends[0])


def performance_gap_recovered(
    pair: Pair, scores: np.ndarray, costs: Costs, small: np.ndarray, large: np.ndarray
) -> float | None:
    """Return the performance gap recovered (PGR): the share of the gap between random choice and oracle closed at equal cost.

    PGR is the ratio of the areas between the curves, over all budgets between always-small and always-large. Budgets too
    small for the router itself count as random choice, with no gain. None if the oracle is no better than random choice.
    """
    budgets = np.linspace(small.mean(), large.mean(), 201)
    at_random = random_wer_percent(pair, small, large, budgets)
    best = at_random - oracle_curve(pair, small, large).at(budgets)
    ours = at_random - curve(pair, scores, costs).at(budgets)
    ours = np.where(np.isnan(ours), 0.0, ours)
    area = np.trapezoid(best, budgets)
    return float(np.trapezoid(ours, budgets) / area) if area > 1e-9 else None


def bootstrap(
    groups: list[Pair], statistic: Callable[[int, np.ndarray], float | None], samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean of `statistic(group, rows)` over groups.

    Utterances are resampled within each group.
    """
    rng, means = np.random.default_rng(seed), []
    for _ in range(samples):
        values = [statistic(g, rng.integers(0, len(pair.ids), len(pair.ids))) for g, pair in enumerate(groups)]
        values = [value for value in values if value is not None]
        if values:
            means.append(np.mean(values))
    if not means:
        return None
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the probability that a positive scores higher than a negative (ties count half); None if one class is empty."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal scores, counted from 1
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def balanced_accuracy(chosen: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the mean of the true positive and the true negative rate; None if one class is empty."""
    if positive.all() or not positive.any():
        return None
    return float((chosen[positive].mean() + (~chosen[~positive]).mean()) / 2)


CALIBRATIONS = ("calibrate_large_share", "calibrate_macs_g", "calibrate_wer_percent")


def threshold_for(pair: Pair, scores: np.ndarray, costs: Costs, key: str, value: float) -> float:
    """Return the threshold that meets a target on these utterances.

    Arguments
    ---------
    pair : Pair
        Validation utterances.
    scores : numpy.ndarray
        Scores of the router, [utterances].
    costs : Costs
        Costs in GMACs.
    key : str
        `calibrate_large_share`: the share (0 to 1) that goes to the large model; `calibrate_macs_g`: the maximum mean cost in
        GMACs; `calibrate_wer_percent`: the maximum WER in percent, met with the smallest possible share.
    value : float
        Value of the target.

    Raises
    ------
    UserError
        If no threshold meets the target.
    """
    points, ranked = curve(pair, scores, costs), np.sort(scores)[::-1]
    # A threshold can only lie between different scores.
    cuts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    if key == "calibrate_large_share":
        if not 0 <= value <= 1:
            raise UserError(f"{key}: {value} is not between 0 and 1")
        sent = int(cuts[np.abs(cuts - value * len(ranked)).argmin()])
    elif key == "calibrate_macs_g":
        fitting = cuts[points.cost[cuts] <= value]
        if not len(fitting):
            raise UserError(
                f"{key}: {value} GMACs are less than the {points.cost.min():.3f} GMACs of the cheapest threshold"
            )
        sent = int(fitting.max())
    else:
        fitting = cuts[points.wer_percent[cuts] <= value]
        if not len(fitting):
            best = points.wer_percent[cuts].min()
            raise UserError(
                f"{key}: no threshold reaches {value} % WER on the validation utterances; the best is {best:.2f} %"
            )
        sent = int(fitting.min())
    if sent == 0:
        return float(np.nextafter(ranked[0], math.inf))
    if sent == len(ranked):
        return float(np.nextafter(ranked[-1], -math.inf))
    return float((ranked[sent - 1] + ranked[sent]) / 2)
