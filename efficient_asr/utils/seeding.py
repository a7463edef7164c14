"""Everything random follows from a seed, in training from where the training stands; and whether numbers are still finite."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import speechbrain as sb
import torch
from torch import nn


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    sb.utils.seed.seed_everything(seed)


def seed_step(*position: int) -> None:
    """Seed Python, NumPy and torch from numbers that say where a training stands."""
    seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  what transformers masks features with
    torch.manual_seed(seed % 2**63)


def gradients_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite."""
    flags = [parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None]
    return bool(torch.stack(flags).all()) if flags else True
