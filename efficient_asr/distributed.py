"""Several processes: what one has to tell the others. With a single process nothing happens here."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process, is_distributed_initialized

__all__ = ["any_process", "ddp_barrier", "ddp_broadcast", "gather", "if_main_process", "processes", "rank", "sums"]


def rank() -> int:
    """Which process this is."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def processes() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def _device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag: is it set in any process?"""
    if not is_distributed_initialized():
        return flags
    return tuple(bool(total) for total in sums([float(flag) for flag in flags]))


def sums(values: list[float]) -> list[float]:
    """Sum each value over all processes."""
    if not is_distributed_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not is_distributed_initialized():
        return [value]
    values = [None] * processes()
    torch.distributed.all_gather_object(values, value)
    return values
