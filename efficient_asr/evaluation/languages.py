"""WER and CER per language."""

from __future__ import annotations

from typing import Any

from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.wer import Errors, error_rate_percent


def by_language(benchmark: Benchmark, errors: list[Errors], character_errors: list[Errors]) -> dict[str, Any]:
    """Return WER and CER per language and their macro averages; an empty dict for a single language."""
    languages = [row.get("language") for row in benchmark.rows]
    if len({*languages}) < 2:
        return {}
    found = {}
    for language in sorted({*languages}, key=str):
        of_it = [i for i, other in enumerate(languages) if other == language]
        found[language or "unnamed"] = {
            "utterances": len(of_it),
            "wer_percent": error_rate_percent([errors[i] for i in of_it]),
            "cer_percent": error_rate_percent([character_errors[i] for i in of_it]),
        }
    means = {
        f"macro_{key}": sum(entry[key] for entry in found.values()) / len(found)
        for key in ("wer_percent", "cer_percent")
        if None not in [entry[key] for entry in found.values()]
    }
    return {"languages": found, **means}
