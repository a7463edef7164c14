r"""Filter pseudo-labels: keep those that are likely right.

As in Distil-Whisper (arXiv 2311.00430, section 3.2), an utterance with a known text is kept if the error rate between the text
and the teacher's transcript, both normalised, is at most :math:`\lambda` (10 %): a higher one means that either of them is wrong.
Audio without a text is kept if the teacher was sure of itself. Anything is left out if the text is empty, repeats itself, or if
the audio is longer than the student's window, or if a limit cut it off.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from efficient_asr.data import Row
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.files import atomic_write, atomic_write_text

METRICS = ("wer", "cer")
LAMBDAS = (100, 80, 40, 20, 15, 10, 5)  # percent, table of the paper


@dataclass(frozen=True)
class Rules:
    """When to keep an utterance; None disables a rule.

    Attributes
    ----------
    metric : str
        `wer` or `cer`.
    max_error_percent : float or None
        Highest error rate of an utterance with a known text, of which something is left after normalisation.
    min_avg_logprob : float or None
        Lowest mean log-probability of the tokens, for utterances without a known text.
    max_no_speech_prob : float or None
        Highest probability of silence, for utterances without a known text.
    max_repetition : float or None
        Highest zlib compression ratio of the text, for all.
    max_duration_s : float or None
        Longest utterance in seconds.
    """

    metric: str = "wer"
    max_error_percent: float | None = 10.0
    min_avg_logprob: float | None = -1.0
    max_no_speech_prob: float | None = 0.6
    max_repetition: float | None = 2.4
    max_duration_s: float | None = 30.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"filter_metric: '{self.metric}' is not wer or cer.{did_you_mean(self.metric, METRICS)}")

    def reasons(self, row: Row) -> list[str]:
        """Return why an utterance is left out; an empty list if it is kept.

        Raises
        ------
        UserError
            If the row is no output of label.py.
        """
        if "compression_ratio" not in row:
            raise UserError(f"utterance '{row.get('id')}' has no labels; run recipes/pseudo_labelling/label.py first")
        found = [] if row["text"].strip() else ["empty text"]
        found += ["unfinished"] if row.get("unfinished") else []
        rate, above, below = row.get(f"{self.metric}_percent"), self._above, self._below
        if rate is not None:
            found += above(rate, self.max_error_percent, self.metric.upper())
        else:
            found += below(row.get("avg_logprob"), self.min_avg_logprob, "log-probability")
            found += above(row.get("no_speech_prob"), self.max_no_speech_prob, "silence")
        found += above(row["compression_ratio"], self.max_repetition, "repetition")
        return found + above(row["duration"], self.max_duration_s, "too long")

    @staticmethod
    def _above(value: float | None, most: float | None, reason: str) -> list[str]:
        return [reason] if None not in (value, most) and value > most else []

    @staticmethod
    def _below(value: float | None, least: float | None, reason: str) -> list[str]:
        return [reason] if None not in (value, least) and value < least else []


def read_labels(path: Path) -> Iterator[Row]:
    """Yield the rows that label.py wrote.

    Raises
    ------
    UserError
        If there is no such file, or a line is damaged.
    """
    if not path.is_file():
        raise UserError(f"no labels at {path}; run recipes/pseudo_labelling/label.py with the same YAML file first")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not {"id", "text", "duration"} <= row.keys():
                raise UserError(f"{path}, line {number}: damaged; delete the file and run label.py again") from None
            yield row


def write_filtered(rows: Iterable[Row], rules: Rules, folder: Path) -> dict[str, Any]:
    """Write `filtered.jsonl`, `left_out.jsonl` (with `reasons`), `filter_report.json` and its figure; return the report."""
    seconds, counts, reasons = Counter(), Counter(), Counter()
    values: dict[str, list[float]] = {"error_percent": [], "avg_logprob": []}
    with (
        atomic_write(folder / "filtered.jsonl") as kept_path, atomic_write(folder / "left_out.jsonl") as left_path,
        open(kept_path, "w", encoding="utf-8") as kept, open(left_path, "w", encoding="utf-8") as left,
    ):  # fmt: skip
        for row in rows:
            why = rules.reasons(row)
            name, file = ("left_out", left) if why else ("kept", kept)
            counts[name] += 1
            seconds[name] += row["duration"]
            reasons.update(why)
            rate, sure = row.get(f"{rules.metric}_percent"), row.get("avg_logprob")
            if rate is not None:
                values["error_percent"].append(rate)
            elif sure is not None:
                values["avg_logprob"].append(sure)
            else:
                counts["unjudged"] += 1
            file.write(json.dumps(row | ({"reasons": why} if why else {}), ensure_ascii=False) + "\n")
    if not counts["kept"] + counts["left_out"]:
        raise UserError(f"there are no labels in {folder}")
    errors = values["error_percent"]
    shares = {f"{most}": 100 * sum(value > most for value in errors) / len(errors) for most in LAMBDAS if errors}
    report = {
        "rules": rules.__dict__, "utterances": {name: counts[name] for name in ("kept", "left_out")},
        "hours": {name: round(seconds[name] / 3600, 3) for name in ("kept", "left_out")},
        "reasons": dict(reasons.most_common()), "with_text": len(errors), "without_text_and_confidence": counts["unjudged"],
        "left_out_percent_by_max_error": shares,
    }  # fmt: skip
    draw(values, rules, folder / "filter_report.png")
    atomic_write_text(folder / "filter_report.json", json.dumps(report, indent=1) + "\n")
    return report


def draw(values: dict[str, list[float]], rules: Rules, path: Path) -> None:
    """Draw how error rates and log-probabilities are distributed, and where the thresholds lie."""
    from matplotlib.figure import Figure

    panels = [
        ("error_percent", f"{rules.metric.upper()} against the original text, %", rules.max_error_percent, "above"),
        ("avg_logprob", "mean log-probability of a token, without a text", rules.min_avg_logprob, "below"),
    ]
    panels = [panel for panel in panels if values[panel[0]]]
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, (name, label, limit, side) in zip(axes, panels, strict=False):
        shown = [min(value, 100.0) for value in values[name]]
        bins = [2.5 * i for i in range(41)] if name == "error_percent" else 30
        axis.hist(shown, bins=bins, color="#4878a8")
        if limit is not None:
            out = sum(value > limit if side == "above" else value < limit for value in values[name])
            axis.axvline(limit, color="#c44e52", label=f"{limit:g}: {100 * out / len(shown):.1f} % are {side}")
            axis.legend(frameon=False)
        axis.set_xlabel(label + (" (100: or more)" if max(values[name]) > 100 else ""))
        axis.set_ylabel("utterances")
        axis.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "efficient_asr"}), atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": None})
