"""BLEU of translations, computed with sacrebleu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficient_asr.evaluation.benchmark import Benchmark


def bleu(benchmark: Benchmark, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return BLEU of unnormalised translations and sacrebleu's signature; an empty dict for transcription."""
    if benchmark.task != "translate":
        return {}
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    found = metric.corpus_score(
        [record["translation"] for record in records], [[benchmark.reference(row) for row in benchmark.rows]]
    )
    return {"bleu": found.score, "bleu_signature": str(metric.get_signature())}
