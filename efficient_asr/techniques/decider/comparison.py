"""Compare routers between a small and a large model on test sets, from the records of both models on every utterance."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch

from efficient_asr.data import SAMPLE_RATE, Rows, read_manifest
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.techniques.decider.analysis import (
    Costs,
    Pair,
    area_under_roc,
    bootstrap,
    curve,
    oracle_curve,
    performance_gap_recovered,
    threshold_for,
)
from efficient_asr.techniques.decider.data import RouterInputs, about_labels, collate_examples, encoder_macs_g, judge
from efficient_asr.techniques.decider.network import Rule
from efficient_asr.techniques.decider.router import ENCODER_FIRST, STATES_OF, Router, RouterInput
from efficient_asr.utils.devices import choose_device, clock
from efficient_asr.utils.errors import UserError


class Comparison:
    """Compares routers, given both models and their records on every split."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.splits = [args.dev, *args.tests]
        self.pairs = {split: self.read(split) for split in self.splits}
        self.rows = {split: self.read_rows(split) for split in self.splits}
        self.device = self.labelled_on()
        self.whispers = {
            side: WhisperTranscriber.from_source(model_source(source)).to(self.device)
            for side, source in zip(("small", "large"), args.models, strict=True)
        }
        self.encoder_costs: dict[str, dict[str, list[np.ndarray]]] = {}  # by split, as far as they were needed

    def read(self, split: str) -> Pair:
        """Read the records of both models on a split."""
        return Pair.read(*(self.args.labels / f"{name}-{split}.jsonl" for name in self.args.pair))

    def labelled_on(self) -> str:
        """Return the device that the times of the records are of.

        Raises
        ------
        UserError
            If there are several, or it is not here: encoders and routers are timed on the same one.
        """
        files = [self.args.labels / f"{name}-{split}.jsonl" for name in self.args.pair for split in self.splits]
        noted = {file: about_labels(file).get("device") for file in files}
        devices = {device: file for file, device in noted.items() if device is not None}  # former versions noted none
        if len(devices) > 1:
            (first, a), (second, b) = list(devices.items())[:2]
            raise UserError(f"times of {a} are of {first}, those of {b} of {second}; label all with the same --device")
        return choose_device(next(iter(devices), "cpu"))

    def read_rows(self, split: str) -> Rows:
        """Return the utterances of the records, in their order; a manifest may have others too.

        Raises
        ------
        UserError
            If one is not in the manifest.
        """
        rows = read_manifest(self.args.manifests / f"{split}.jsonl")
        place = {row["id"]: i for i, row in enumerate(rows)}
        ids = self.pairs[split].ids
        missing = next((name for name in ids if name not in place), None)
        if missing is not None:
            raise UserError(f"--manifests: {split}.jsonl has no utterance '{missing}', which is in the records")
        return rows.select([place[name] for name in ids])

    def encoders_of(self, router: Router, split: str) -> dict[str, list[np.ndarray]]:
        """Return GMACs and seconds of both encoders on the utterances of a split, [utterances] each; 0 if a route needs none."""
        durations, whispers = self.pairs[split].durations, self.whispers.values()
        if router.router_input not in ENCODER_FIRST:
            return {key: [np.zeros(len(durations))] * 2 for key in ("macs_g", "time_s")}
        if split not in self.encoder_costs:
            self.encoder_costs[split] = {
                "macs_g": [encoder_macs_g(whisper, durations) for whisper in whispers],
                "time_s": [encoder_time_s(whisper, durations) for whisper in whispers],
            }
        return self.encoder_costs[split]

    @property
    def encoders(self) -> dict[str, list[float]]:
        """Means over the tests of the costs of the small and of the large encoder; empty if no router needs an encoder alone."""
        of_tests = [self.encoder_costs[split] for split in self.args.tests if split in self.encoder_costs]
        keys = ("macs_g", "time_s") if of_tests else ()
        return {
            key: [float(np.concatenate([costs[key][side] for costs in of_tests]).mean()) for side in (0, 1)]
            for key in keys
        }

    def costs(self, router: Router, pair: Pair, key: str, own: np.ndarray, encoders: dict[str, Any]) -> Costs:
        """Return the costs of both routes, in GMACs or seconds; `own` is the cost of the router."""
        return Costs.of(router.router_input, *pair.values(key), *encoders[key], own)

    def score(self, router: Router, split: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Return scores and GMACs of a router on a split, [utterances], and its mean time in seconds."""
        pair, rows = self.pairs[split], self.rows[split]
        if isinstance(router, Rule):
            lengths = torch.from_numpy(np.round(pair.durations * 16000).astype(np.int64))
            inputs = RouterInput(
                torch.zeros(len(rows), 0), lengths, None, [row["text"] for row in pair.small], pair.small
            )
            return router(inputs).double().numpy(), np.zeros(len(rows)), 0.0
        sides = dict(zip(("small", "large"), self.args.models, strict=True))
        names = dict(zip(("small_name", "large_name"), self.args.pair, strict=True))
        hparams = {"states_folder": self.args.states, "labels_folder": self.args.labels} | sides | names
        side = STATES_OF.get(router.router_input)
        whisper = self.whispers[side] if side and self.args.states is None else None
        source = RouterInputs.of(router, hparams, split, whisper)
        scores, macs_g = judge(router, rows, source)
        return scores, macs_g, router_time_s(router, rows, source)

    def compare(self, name: str, routers: list[Router]) -> dict[str, Any]:
        """Return the results of routers of one kind (one per seed) on every test split."""
        seen = [{split: self.score(router.to(self.device), split) for split in self.splits} for router in routers]
        out: dict[str, Any] = {"router_input": routers[0].router_input, "seeds": len(routers), "splits": {}}
        for split in self.args.tests:
            pair = self.pairs[split]
            closed = {
                key: [self.closed(router, split, of[split], key) for router, of in zip(routers, seen, strict=True)]
                for key in ("macs_g", "time_s")
            }
            aucs = [area_under_roc(of[split][0], pair.gains > 0) for of in seen]
            out["splits"][split] = {
                "auc": mean(aucs), "pgr": mean(closed["macs_g"]), "pgr_in_time": mean(closed["time_s"])
            }  # fmt: skip
        for key in ("auc", "pgr", "pgr_in_time"):
            out[key] = mean([entry[key] for entry in out["splits"].values()])
        out["pgr_ci95"] = self.interval(routers, seen)
        out["points"] = self.operating_points(routers, seen)
        out["curves"] = {key: self.pooled_curve(routers[0], seen[0], key) for key in ("macs_g", "time_s")}
        return out

    def closed(self, router: Router, split: str, seen: tuple, key: str, rows: np.ndarray | None = None) -> float | None:
        """Return a router's performance gap recovered (PGR) on (resampled) utterances of a split."""
        pair, encoders = self.pairs[split], self.encoders_of(router, split)
        scores, macs_g, time_s = seen
        own = macs_g if key == "macs_g" else np.full(len(scores), time_s)
        if rows is not None:
            pair, scores, own = pair.select(rows), scores[rows], own[rows]
            encoders = {key: [costs[rows] for costs in encoders[key]]}
        costs = self.costs(router, pair, key, own, encoders)
        return performance_gap_recovered(pair, scores, costs, *pair.values(key))

    def interval(self, routers: list[Router], seen: list[dict]) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of the mean PGR at equal MACs over test sets (and seeds)."""
        groups = [self.pairs[split] for split in self.args.tests]

        def statistic(group: int, rows: np.ndarray) -> float | None:
            split = self.args.tests[group]
            return mean([self.closed(r, split, of[split], "macs_g", rows) for r, of in zip(routers, seen, strict=True)])

        return bootstrap(groups, statistic, self.args.bootstrap)

    def operating_points(self, routers: list[Router], seen: list[dict]) -> list[dict[str, Any]]:
        """Return WER and costs over all test sets at thresholds set on dev: for several shares, and for the large model's WER."""
        dev = self.pairs[self.args.dev]
        large_wer = 100 * dev.values("errors")[1].sum() / dev.words.sum()
        wishes = [("calibrate_large_share", share) for share in (0.1, 0.2, 0.3, 0.5, 0.7)] + [
            ("calibrate_wer_percent", large_wer)
        ]
        points = []
        for key, value in wishes:
            found = []
            for router, of in zip(routers, seen, strict=True):
                scores, macs_g, _ = of[self.args.dev]
                costs = self.costs(router, dev, "macs_g", macs_g, self.encoders_of(router, self.args.dev))
                threshold = threshold_for(dev, scores, costs, key, value)
                found.append(self.outcome(router, of, threshold))
            points.append({key: value} | {name: statistics.mean(point[name] for point in found) for name in found[0]})
        return points

    def outcome(self, router: Router, seen: dict, threshold: float) -> dict[str, float]:
        """Return large model rate, WER and mean costs over all test sets at a threshold."""
        errors = words = sent = count = 0.0
        totals = {"macs_g": 0.0, "time_s": 0.0}
        for split in self.args.tests:
            pair, (scores, macs_g, time_s) = self.pairs[split], seen[split]
            hard = scores > threshold
            errors += np.where(hard, *pair.values("errors")[::-1]).sum()
            words, sent, count = words + pair.words.sum(), sent + hard.sum(), count + len(hard)
            for key, own in (("macs_g", macs_g), ("time_s", np.full(len(hard), time_s))):
                costs = self.costs(router, pair, key, own, self.encoders_of(router, split))
                totals[key] += np.where(hard, costs.hard, costs.easy).sum()
        return {"large_model_rate": sent / count, "wer_percent": 100 * errors / words} | {
            key: total / count for key, total in totals.items()
        }

    def pooled(self) -> Pair:
        """Return all test utterances as one pair."""
        parts = [self.pairs[split] for split in self.args.tests]
        records = [[row for part in parts for row in getattr(part, side)] for side in ("small", "large")]
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ("durations", "words")]
        return Pair([f"{i}" for i in range(len(arrays[0]))], *arrays, *records)

    def pooled_curve(self, router: Router, seen: dict, key: str) -> list[list[float]]:
        """Return the points (cost, WER) of a router's curve over all test sets."""
        scores, macs_g = (np.concatenate([seen[split][i] for split in self.args.tests]) for i in (0, 1))
        times = np.concatenate([np.full(len(seen[split][0]), seen[split][2]) for split in self.args.tests])
        pair = self.pooled()
        parts = [self.encoders_of(router, split)[key] for split in self.args.tests]
        encoders = {key: [np.concatenate(sides) for sides in zip(*parts, strict=True)]}
        found = curve(pair, scores, self.costs(router, pair, key, macs_g if key == "macs_g" else times, encoders))
        points = [[round(float(v), 4) for v in point] for point in zip(found.cost, found.wer_percent, strict=True)]
        return points[:-1:2] + points[-1:]

    def single_models(self) -> dict[str, Any]:
        """Return WER and costs of always-small, always-large and the oracle, over all test sets and per test set."""
        out: dict[str, Any] = {}
        for split in ["all", *self.args.tests]:
            pair = self.pooled() if split == "all" else self.pairs[split]
            errors, macs, times = (pair.values(key) for key in ("errors", "macs_g", "time_s"))
            best = {key: oracle_curve(pair, *pair.values(key)) for key in ("macs_g", "time_s")}
            entry = {
                name: {"wer_percent": 100 * e.sum() / pair.words.sum(), "macs_g": m.mean(), "time_s": t.mean()}
                for name, e, m, t in zip(("small", "large"), errors, macs, times, strict=True)
            }
            entry["oracle"] = {
                "wer_percent": best["macs_g"].wer_percent[-1], "macs_g": best["macs_g"].cost[-1],
                "time_s": best["time_s"].cost[-1], "large_model_rate": best["macs_g"].rate[-1],
            }  # fmt: skip
            if split == "all":
                curves = {
                    k: [[round(float(v), 4) for v in p] for p in zip(c.cost, c.wer_percent, strict=True)]
                    for k, c in best.items()
                }
                entry["oracle"]["curves"] = curves
            out[split] = {"utterances": len(pair.ids), "reference_words": pair.words.sum()} | entry
        return out


def mean(values: list[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def encoder_time_s(transcriber: WhisperTranscriber, durations: np.ndarray) -> np.ndarray:
    """Return the runtime of a Whisper encoder at batch size 1 for utterances of these durations, in seconds, [utterances].

    Medians of five runs; where it depends on the duration, they are taken at six durations, and interpolated in between.
    """
    own_length = transcriber.model.encoder_padding is not None
    grid = np.linspace(durations.min(), durations.max(), 6) if own_length else durations[:1]
    found = []
    for duration in grid:
        wavs = torch.randn(1, round(duration * SAMPLE_RATE))
        found.append(timed(lambda wavs=wavs: transcriber.encode(wavs, torch.ones(1), hidden_states=True), 5))
    return np.interp(durations, grid, found)


def router_time_s(router: Router, rows: Any, source: RouterInputs) -> float:
    """Return a router's mean runtime per utterance over the first 20 utterances, in seconds."""
    times, device = [], next(router.parameters()).device
    for row in [rows[i] for i in range(min(20, len(rows)))]:
        seen = {"id": row["id"], "duration": row["duration"], "gain": 0.0} | source.load(row)
        inputs = source.complete(collate_examples([seen]).to(device).inputs, device)
        times.append(timed(lambda inputs=inputs: router(inputs), 3))
    return float(np.mean(times))


def timed(work: Any, repeats: int) -> float:
    """Return the median runtime in seconds of `repeats` runs after one warm-up run."""
    found = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = clock()
            work()
            found.append(clock() - started)
    return statistics.median(found[1:])
