"""The arithmetic of routing between a small and a large model, from what each of them did on every utterance.

`recipes/decider/label.py` writes one file a model; two of the same manifest make a `Pair`. From a pair and the scores of
any router follow, exactly and without running anything again, WER and cost at every threshold, those of choosing at random
and of an oracle, the share of the oracle's gain that a router closes at equal cost, and the threshold for a wanted share,
budget or WER.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficient_asr.utils.errors import UserError

HOW = "run recipes/decider/label.py with both models on this manifest first"


@dataclass
class Pair:
    """What two models did on the same utterances; arrays of [utterances].

    Attributes
    ----------
    ids : list of str
        Utterances, in the order of the small model's file.
    durations : numpy.ndarray
        Seconds.
    words : numpy.ndarray
        Words of the references.
    small, large : list of dict
        The records.
    """

    ids: list[str]
    durations: np.ndarray
    words: np.ndarray
    small: list[dict[str, Any]]
    large: list[dict[str, Any]]

    @classmethod
    def read(cls, small: Path, large: Path) -> Pair:
        """Read two files of `recipes/decider/label.py`.

        Raises
        ------
        UserError
            Where one is missing, or they are not of the same utterances.
        """
        records = [read_records(path) for path in (small, large)]
        ids = list(records[0])
        if set(ids) != set(records[1]):
            odd = sorted(set(ids) ^ set(records[1]))
            raise UserError(f"{small} and {large} hold different utterances (for example {odd[0]}); {HOW}")
        for name in ids:
            if records[0][name]["reference"] != records[1][name]["reference"]:
                raise UserError(f"{small} and {large} have another reference for '{name}'; {HOW}")
        rows = [[of[name] for name in ids] for of in records]
        durations, words = (
            np.array([row[key] for row in rows[0]], dtype=float) for key in ("duration", "reference_words")
        )
        return cls(ids, durations, words, *rows)

    def values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a number of the small and of the large model's records."""
        return tuple(np.array([row[key] for row in rows], dtype=float) for rows in (self.small, self.large))

    @property
    def gains(self) -> np.ndarray:
        """Errors of the small model less those of the large."""
        small, large = self.values("errors")
        return small - large

    def select(self, rows: np.ndarray) -> Pair:
        """Return some utterances, with repetition where an index comes twice."""
        picked = [[of[i] for i in rows] for of in (self.small, self.large)]
        return Pair([self.ids[i] for i in rows], self.durations[rows], self.words[rows], *picked)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of `recipes/decider/label.py` by id.

    Raises
    ------
    UserError
        Where it is missing or not such a file.
    """
    if not Path(path).is_file():
        raise UserError(f"no records at {path}; {HOW}")
    records = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number} is no record of recipes/decider/label.py") from None
    if not records:
        raise UserError(f"{path} holds no records; {HOW}")
    return records


@dataclass
class Costs:
    """What an utterance costs where the router keeps it, and where it sends it on; arrays of [utterances]."""

    easy: np.ndarray
    hard: np.ndarray

    @classmethod
    def of(
        cls, order: str, small: np.ndarray, large: np.ndarray, small_encoder: float = 0.0, large_encoder: float = 0.0,
        router: float | np.ndarray = 0.0,
    ) -> Costs:  # fmt: skip
        """Return them for what a router looks at: `audio`, `encoder`, `transcript` or `large_encoder` (see
        `evaluation/cascade.py`).

        Arguments
        ---------
        order : str
            What the router looks at.
        small, large : numpy.ndarray
            Cost of the whole models, [utterances].
        small_encoder, large_encoder : float
            Cost of their encoders alone, the same for every utterance.
        router : float or numpy.ndarray
            Cost of the router.
        """
        if order == "audio":
            return cls(small + router, large + router)
        if order == "encoder":
            return cls(small + router, large + small_encoder + router)
        if order == "transcript":
            return cls(small + router, small + large + router)
        if order == "large_encoder":
            return cls(small + large_encoder + router, large + router)
        raise ValueError(order)


@dataclass
class Curve:
    """WER in percent against mean cost, for every number of utterances that are sent on, rising; [points]."""

    cost: np.ndarray
    wer_percent: np.ndarray
    rate: np.ndarray

    def at(self, cost: np.ndarray) -> np.ndarray:
        """WER at a mean cost, linear between points; not a number below the first, flat behind the last.

        Measured times may fall where a utterance happened to take the small model longer: there a cost stays what it was.
        """
        return np.interp(cost, np.maximum.accumulate(self.cost), self.wer_percent, left=np.nan)


def curve(pair: Pair, scores: np.ndarray, costs: Costs) -> Curve:
    """Send the utterances on one after the other, the highest score first."""
    order = np.argsort(-scores, kind="stable")
    small, large = pair.values("errors")
    errors = small.sum() - np.concatenate([[0.0], np.cumsum((small - large)[order])])
    cost = costs.easy.sum() + np.concatenate([[0.0], np.cumsum((costs.hard - costs.easy)[order])])
    count = len(order)
    return Curve(cost / count, 100 * errors / max(1.0, pair.words.sum()), np.arange(count + 1) / count)


def oracle_curve(pair: Pair, small: np.ndarray, large: np.ndarray) -> Curve:
    """The best choice, for it knows the errors: largest gains first, none that gains nothing, no router to pay."""
    gains = pair.gains
    best = curve(pair, gains, Costs(small, large))
    used = int((gains > 0).sum()) + 1
    return Curve(best.cost[:used], best.wer_percent[:used], best.rate[:used])


def random_wer_percent(pair: Pair, small: np.ndarray, large: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """WER of choosing at random at mean costs between always-small and always-large: the straight line between these two."""
    ends = [100 * values.sum() / max(1.0, pair.words.sum()) for values in pair.values("errors")]
    rates = np.clip((cost - small.mean()) / (large.mean() - small.mean()), 0.0, 1.0)
    return ends[0] + rates * (ends[1] - ends[0])


def performance_gap_recovered(
    pair: Pair, scores: np.ndarray, costs: Costs, small: np.ndarray, large: np.ndarray
) -> float | None:
    """Share of the gap between choosing at random and the oracle that a router closes at equal cost.

    The areas between the curves are compared, over all budgets between always-small and always-large. Where a budget is
    too small for the router itself, one would choose at random: no gain. None where the oracle gains nothing.
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
    """95 % interval of the mean over groups of `statistic(group, rows)`, resampling utterances within each group."""
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
    """Probability that a positive example scores higher than a negative one, ties half; None where one kind is missing."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def balanced_accuracy(chosen: np.ndarray, positive: np.ndarray) -> float | None:
    """Mean of the shares of positives that were chosen and of negatives that were not; None where one kind is missing."""
    if positive.all() or not positive.any():
        return None
    return float((chosen[positive].mean() + (~chosen[~positive]).mean()) / 2)


CALIBRATIONS = ("calibrate_large_share", "calibrate_macs_g", "calibrate_wer_percent")


def threshold_for(pair: Pair, scores: np.ndarray, costs: Costs, key: str, value: float) -> float:
    """Return the threshold that meets a wish on these utterances.

    Arguments
    ---------
    pair : Pair
        Validation utterances.
    scores : numpy.ndarray
        Of the router, [utterances].
    costs : Costs
        In GMACs.
    key : str
        `calibrate_large_share`: this share (0 to 1) goes to the large model; `calibrate_macs_g`: a mean cost of at most so
        many GMACs; `calibrate_wer_percent`: the smallest share with a WER of at most so many percent.

    Raises
    ------
    UserError
        Where no threshold does.
    """
    points, ranked = curve(pair, scores, costs), np.sort(scores)[::-1]
    # Only between different scores can a threshold stand.
    cuts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    if key == "calibrate_large_share":
        if not 0 <= value <= 1:
            raise UserError(f"{key}: {value} is not between 0 and 1")
        sent = int(cuts[np.abs(cuts - value * len(ranked)).argmin()])
    elif key == "calibrate_macs_g":
        fitting = cuts[points.cost[cuts] <= value]
        if not len(fitting):
            raise UserError(
                f"{key}: {value} GMACs are less than the {points.cost.min():.3f} that the cheapest choice costs"
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
