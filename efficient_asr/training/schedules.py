"""Learning rate schedules that change at every step."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.nnet.schedulers import update_learning_rate

from efficient_asr.utils.errors import UserError


class LinearSchedule:
    """Linear warm-up from 0 to `lr`, then linear decay to 0, as in the trainer of transformers.

    Arguments
    ---------
    lr : float
        Peak learning rate.
    warmup_ratio : float
        Fraction of all steps used for warm-up.
    warmup_steps : int, optional
        Steps used for warm-up, instead of a fraction of all steps.

    Raises
    ------
    UserError
        If `warmup_ratio` is not between 0 and 1.
    """

    def __init__(self, lr: float, warmup_ratio: float = 0.1, warmup_steps: int | None = None) -> None:
        if not 0 <= warmup_ratio <= 1:
            raise UserError(f"warmup_ratio: {warmup_ratio} is not between 0 and 1")
        self.lr, self.warmup_ratio, self.warmup_steps = lr, warmup_ratio, warmup_steps
        self.step, self.total_steps = 0, 1
        self.planned: int | None = None  # the total of the run that wrote the checkpoint

    @property
    def value(self) -> float:
        """Learning rate of the next step."""
        warm_up = round(self.warmup_ratio * self.total_steps) if self.warmup_steps is None else self.warmup_steps
        if self.step < warm_up:
            return self.lr * (self.step + 1) / (warm_up + 1)
        return self.lr * max(0, self.total_steps - self.step) / max(1, self.total_steps - warm_up)

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Set the total number of steps and the learning rate of the next step; a change of the total is reported."""
        if self.planned not in (None, total_steps):
            print(f"the learning rate now falls until step {total_steps}, not {self.planned}: it changes at once")
        self.total_steps = self.planned = total_steps
        update_learning_rate(optimizer, self.value)

    def on_batch_end(self, optimizer: torch.optim.Optimizer) -> None:
        """Advance one step and set its learning rate."""
        self.step += 1
        update_learning_rate(optimizer, self.value)

    def __call__(self, loss: float) -> tuple[float, float]:
        """Return the learning rate before and after an epoch; it does not depend on the loss."""
        return self.value, self.value

    def state_dict(self) -> dict[str, Any]:
        """Return the current step, the peak learning rate and the total number of steps."""
        return {"step": self.step, "lr": self.lr, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the current step and the peak learning rate."""
        self.step, self.lr, self.planned = state["step"], state["lr"], state.get("total_steps")
