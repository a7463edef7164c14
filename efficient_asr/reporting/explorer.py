"""Explorer of results: one self-contained HTML file, which needs no server and no network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import efficient_asr
from efficient_asr.evaluation.result import Result
from efficient_asr.reporting.figures import COLOURS
from efficient_asr.reporting.plots import plot_group
from efficient_asr.reporting.results import load_runs
from efficient_asr.reporting.tables import row_name
from efficient_asr.utils.errors import UserError

TEMPLATE = Path(efficient_asr.__file__).parent / "assets" / "explorer.html"
PLACE = "/*RESULTS*/"


def explorer_html(folder: Path) -> str:
    """Return the page for all results of a folder.

    Raises
    ------
    UserError
        If the folder has no results.
    """
    runs = load_runs(folder)
    if not runs:
        raise UserError(f"{folder} contains no results (*.json)")
    benchmarks: dict[str, dict[str, list[Any]]] = {}
    results = [_entry(result, benchmarks) for result in runs]
    data = {"results": results, "benchmarks": benchmarks, "colours": COLOURS}
    # "<" cannot end the script element, and U+2028 cannot end a line of it
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def _entry(result: Result, benchmarks: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return what the page shows of a result; the references of its utterances go to `benchmarks`."""
    out = io.StringIO()
    YAML().dump(json.loads(json.dumps(result.hparams)), out)
    entry = {
        "name": result.experiment, "row": row_name(result), "technique": result.technique, "group": plot_group(result),
        "benchmark": result.benchmark_hash, "corpus": f"{result.corpus}/{result.split} ({result.normaliser})",
        "synthetic": result.synthetic, "wer": result.wer_percent, "interval": result.wer_ci95_percent,
        "cer": result.cer_percent, "macs": result.macs_g, "parameters": result.parameters, "utterances": result.utterances,
        "audio_s": result.audio_s, "runtimes": [r for r in result.runtimes if not r["lm"]],
        "details": {k: v for k, v in result.details.items() if isinstance(v, (bool, int, float, str))},
        "yaml": out.getvalue(), "provenance": result.provenance, "file": result.path.name if result.path else "",
    }  # fmt: skip
    if result.path is not None and result.path.with_suffix(".utterances.jsonl").is_file():
        rows = sorted(result.load_utterances(), key=lambda row: row["id"])
        known = benchmarks.setdefault(
            result.benchmark_hash, {"ids": [r["id"] for r in rows], "references": [r["reference"] for r in rows]}
        )
        if known["ids"] == [row["id"] for row in rows]:
            entry["hypotheses"] = [row["hypothesis"] for row in rows]
            entry["errors"] = [row.get("errors") for row in rows]
    return entry
