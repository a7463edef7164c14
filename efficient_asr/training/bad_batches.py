"""Unusable batches: unreadable audio, and losses or gradients that are not finite."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from efficient_asr.training.logs import Logs
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError, listing


class BadBatches:
    """Reports unusable batches and stops the training when patience is exhausted.

    Arguments
    ---------
    folder : Path
        Output folder of the run.
    logs : Logs
        Logs of the run.
    skip_bad : bool
        Whether to skip utterances that cannot be read.
    patience : int
        Maximum number of skipped steps per epoch.
    """

    def __init__(self, folder: Path, logs: Logs, skip_bad: bool, patience: int) -> None:
        self.skipped_file, self.logs = Path(folder) / "skipped_unreadable.jsonl", logs
        self.skip_bad, self.patience = skip_bad, patience
        self.nonfinite = 0  # skipped steps in this epoch

    def handle_unreadable(self, batch: Any) -> None:
        """Stop at utterances that cannot be read, or record them if they may be skipped.

        Raises
        ------
        UserError
            Naming the first utterance, unless `skip_bad` is set.
        """
        for problem in batch.problems:
            if not self.skip_bad:
                raise UserError(
                    f"utterance '{problem['id']}': {problem['problem']}\nFix the file and rerun to resume, or pass "
                    "--skip_bad True to leave such utterances out."
                )
            print(f"left out: utterance '{problem['id']}': {problem['problem']}", file=sys.stderr)
            with open(self.skipped_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(problem, ensure_ascii=False) + "\n")

    def report_nonfinite(self, what: str, ids: list[str], epoch: int, batch: int) -> None:
        """Report the utterances, of all processes, in a skipped step.

        Raises
        ------
        UserError
            If patience is exhausted.
        """
        self.nonfinite += 1
        ids = list(itertools.chain.from_iterable(distributed.all_gather(ids)))
        names = listing([", ".join(ids[i : i + 8]) for i in range(0, len(ids), 8)])
        message = f"the {what} is not finite in epoch {epoch}, batch {batch}, with these utterances:\n{names}"
        if distributed.if_main_process():
            self.logs.append("nonfinite.jsonl", {"epoch": epoch, "batch": batch, "what": what, "ids": ids})
            print(f"step skipped: {message}", file=sys.stderr)
        if self.nonfinite > self.patience:
            raise UserError(
                f"{message}\n{self.nonfinite} non-finite steps exceed nonfinite_patience={self.patience}. Inspect the utterances "
                f"listed in {self.logs.paths['nonfinite.jsonl']}, or lower the learning rates."
            )
