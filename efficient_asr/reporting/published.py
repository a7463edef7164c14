"""Published results with their sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from efficient_asr.evaluation.result import Result
from efficient_asr.utils.errors import UserError


@dataclass
class Published:
    """One row of a published table, with its source.

    Attributes
    ----------
    technique, variant : str
        Same names as in our results, so that rows can be matched.
    values : dict
        `wer_percent`, `wer_lm_percent`, `macs_g`, `cpu_s`, `gpu_s`; absent if the source does not report it.
    paper, source : str
        Citation, and the place of the number in the paper.
    setting : str
        Model, training and test data of the source.
    name : str
        Name of the row in the source.
    corpus, split, model : str
        Data and model of the source, as our results name them: rows of other data or models are not comparable.
    """

    technique: str
    variant: str
    values: dict[str, float]
    paper: str
    source: str
    setting: str
    name: str
    corpus: str
    split: str
    model: str

    def matches(self, result: Result) -> bool:
        """Whether this row and a result are the same technique at the same setting, with the same model on the same data."""
        same_row = (self.technique, self.variant) == (result.technique, result.variant)
        same_data = (self.corpus, self.split) == (result.corpus, result.split)
        return same_row and same_data and result.model_name == self.model


def load_published(folder: Path) -> list[Published]:
    """Read all published tables of a folder.

    Raises
    ------
    UserError
        If a table does not name its source.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for key in ("paper", "source", "setting", "corpus", "split", "model", "rows"):
            if not table.get(key):
                raise UserError(f"{path}: '{key}' is missing; published numbers need their source")
        for row in table["rows"]:
            values = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            source = row.get("source", table["source"])
            rows.append(
                Published(
                    row["technique"],
                    row["variant"],
                    values,
                    table["paper"],
                    source,
                    table["setting"],
                    row["name"],
                    table["corpus"],
                    table["split"],
                    row.get("model", table["model"]),
                )
            )
    return rows
