"""Batches that cannot be used: audio that cannot be read, losses and gradients that are not finite."""

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
    """Names what cannot be used, and stops the training where patience is exhausted.

    Arguments
    ---------
    folder : Path
        Of the run.
    logs : Logs
        Its logs.
    skip_bad : bool
        Whether utterances that cannot be read are left out.
    patience : int
        Steps of an epoch that may be skipped.
    """

    def __init__(self, folder: Path, logs: Logs, skip_bad: bool, patience: int) -> None:
        self.skipped_file, self.logs = Path(folder) / "skipped_unreadable.jsonl", logs
        self.skip_bad, self.patience = skip_bad, patience
        self.nonfinite = 0  # steps of this epoch that were skipped

    def handle_unreadable(self, batch: Any) -> None:
        """Stop at utterances that could not be read, or note them where they may be left out.

        Raises
        ------
        UserError
            Naming the first one.
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
        """Name the utterances, of all processes, of a step that is skipped.

        Raises
        ------
        UserError
            Where patience is exhausted.
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
