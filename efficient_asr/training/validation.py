"""Validation counts: losses and word errors, per output if the model has several."""

from __future__ import annotations

import jiwer

from efficient_asr.utils import distributed


class ValidationCounts:
    """Sums over the validation utterances of this process.

    Arguments
    ---------
    outputs : tuple of str
        Outputs to count separately: suffixes of names in the log; `("",)` for a single output.
    """

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self.outputs = outputs
        counted = [name + output for output in outputs for name in ("errors", "words")]
        self.totals = dict.fromkeys(("loss", "utterances", *counted), 0.0)

    def add_loss(self, loss: float, utterances: int) -> None:
        """Add the mean loss of a batch."""
        self.totals["loss"] += loss * utterances
        self.totals["utterances"] += utterances

    def add_texts(self, references: list[str], hypotheses: list[str], output: str = "") -> None:
        """Add the word errors of a batch."""
        words = jiwer.process_words(references, hypotheses)
        self.totals["errors" + output] += words.substitutions + words.deletions + words.insertions
        self.totals["words" + output] += words.hits + words.substitutions + words.deletions

    def all_processes(self) -> dict[str, float]:
        """Return the sums over all processes."""
        return dict(zip(self.totals, distributed.all_reduce(list(self.totals.values())), strict=True))

    def error_rates(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the WER in percent; for several outputs, the mean and the WER of each output."""
        rates = {o: 100 * totals["errors" + o] / max(1.0, totals["words" + o]) for o in self.outputs}
        stats = {"wer_percent": sum(rates.values()) / len(rates)}
        return stats | {f"wer_percent{output}": rate for output, rate in rates.items() if output}
