"""Where a training stands: epoch, batch and step, and how many of them there are."""

from __future__ import annotations

import math

import speechbrain as sb
from speechbrain.utils.epoch_loop import EpochCounter

from efficient_asr.data import BatchOrder

PHASES = ("training", "validation", "done")  # of an epoch


class Position:
    """Where a training stands. The batch and the step are counted by the Brain.

    Arguments
    ---------
    brain : sb.Brain
        With `step` (batches of the epoch) and `optimizer_step` (steps since the beginning).
    epochs : EpochCounter
        Counts epochs.
    sampler : BatchOrder
        Forms the batches of an epoch.
    batches : int
        Batches of an epoch, for planning.
    """

    def __init__(self, brain: sb.Brain, epochs: EpochCounter, sampler: BatchOrder, batches: int) -> None:
        self.brain, self.epochs, self.sampler, self.batches = brain, epochs, sampler, batches
        self.phase = PHASES[0]

    @property
    def epoch(self) -> int:
        """The current epoch, from 1."""
        return self.epochs.current

    @property
    def total_steps(self) -> int:
        """Steps of the optimisers in the whole training."""
        return max(1, self.epochs.limit * math.ceil(self.batches / self.brain.grad_accumulation_factor))

    @property
    def epoch_batches(self) -> int:
        """Batches of the current epoch, which may differ from epoch to epoch where they are formed by length."""
        batches = len(self.sampler)
        return min(batches, self.brain.debug_batches) if self.brain.debug else batches

    @property
    def group_size(self) -> int:
        """Batches of the current step: the last ones of an epoch may be fewer than `grad_accumulation_factor`."""
        rest = self.epoch_batches % self.brain.grad_accumulation_factor
        return rest if self.brain.step > self.epoch_batches - rest else self.brain.grad_accumulation_factor

    @property
    def between_steps(self) -> bool:
        """Whether no batch waits for others of its step."""
        return self.brain.step % self.brain.grad_accumulation_factor == 0 or self.brain.step == self.epoch_batches

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps."""
        return self.brain.optimizer_step / self.total_steps

    @property
    def done(self) -> tuple[int, int]:
        """Return the epochs that are done, and the batches of the one that is not."""
        if self.phase == "done":
            return self.epoch, 0
        return self.epoch - 1, self.brain.step if self.phase == "training" else self.epoch_batches

    def restore(self, epochs_done: int, step: int) -> None:
        """Go to where a checkpoint was written."""
        self.epochs.current = epochs_done
        self.brain.step = self.sampler.skip = step
