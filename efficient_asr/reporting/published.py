"""Published numbers, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from efficient_asr.utils.errors import UserError


@dataclass
class Published:
    """One row of a published table, with its source.

    Attributes
    ----------
    technique, variant : str
        As in our results, so that both can stand side by side.
    values : dict
        `wer_percent`, `wer_lm_percent`, `macs_g`, `cpu_s`, `gpu_s`; absent where the source gives none.
    paper, source : str
        Citation, and where the number was read.
    setting : str
        Model, training and test data of the source.
    name : str
        The source's own name of the row.
    """

    technique: str
    variant: str
    values: dict[str, float]
    paper: str
    source: str
    setting: str
    name: str


def load_published(folder: Path) -> list[Published]:
    """Read all published tables of a folder.

    Raises
    ------
    UserError
        Where a table names no source.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for key in ("paper", "source", "setting", "rows"):
            if not table.get(key):
                raise UserError(f"{path}: '{key}' is missing; published numbers need their source")
        for row in table["rows"]:
            values = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            source = row.get("source", table["source"])
            rows.append(
                Published(
                    row["technique"], row["variant"], values, table["paper"], source, table["setting"], row["name"]
                )
            )
    return rows
