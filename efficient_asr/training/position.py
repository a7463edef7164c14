"""Position in a training: current epoch, batch and step, and their totals."""

from __future__ import annotations

import math

import speechbrain as sb
from speechbrain.utils.epoch_loop import EpochCounter

from efficient_asr.data import BatchOrder

PHASES = ("training", "validation", "done")  # phases of an epoch


class Position:
    """Position in a training. The Brain counts batches and steps.

    Arguments
    ---------
    brain : sb.Brain
        Provides `step` (batches done in the epoch) and `optimizer_step` (steps since the start of the training).
    epochs : EpochCounter
        Counts epochs.
    sampler : BatchOrder
        Forms the batches of an epoch.
    batches : int
        Expected number of batches per epoch.
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
        """Optimiser steps in the whole training."""
        return max(1, self.epochs.limit * math.ceil(self.batches / self.brain.grad_accumulation_factor))

    @property
    def epoch_batches(self) -> int:
        """Number of batches in the current epoch; varies between epochs if batches are formed by length."""
        batches = len(self.sampler)
        return min(batches, self.brain.debug_batches) if self.brain.debug else batches

    @property
    def group_size(self) -> int:
        """Number of batches in the current step; the last step of an epoch may have fewer than `grad_accumulation_factor`."""
        rest = self.epoch_batches % self.brain.grad_accumulation_factor
        return rest if self.brain.step > self.epoch_batches - rest else self.brain.grad_accumulation_factor

    @property
    def between_steps(self) -> bool:
        """Whether the current batch completes its step, so that no gradients are pending."""
        return self.brain.step % self.brain.grad_accumulation_factor == 0 or self.brain.step == self.epoch_batches

    @property
    def progress(self) -> float:
        """Completed fraction of the training, in steps."""
        return self.brain.optimizer_step / self.total_steps

    @property
    def done(self) -> tuple[int, int]:
        """Number of completed epochs, and of completed batches in the current epoch."""
        if self.phase == "done":
            return self.epoch, 0
        return self.epoch - 1, self.brain.step if self.phase == "training" else self.epoch_batches

    def restore(self, epochs_done: int, step: int) -> None:
        """Restore the position stored in a checkpoint."""
        self.epochs.current = epochs_done
        self.brain.step = self.sampler.skip = step
