"""Seeding from a seed or from the position in training, and a check for finite gradients."""

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
    """Seed Python, NumPy and torch from the position in training, such as seed, epoch and step."""
    seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  used by transformers to mask features
    torch.manual_seed(seed % 2**63)


def gradients_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite, and the sum of their squares; one synchronisation with a GPU."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())
