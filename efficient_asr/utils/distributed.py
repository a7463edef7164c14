"""Communication between the processes of a distributed run; no-ops in a single process."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process, is_distributed_initialized

__all__ = [
    "all_gather",
    "all_reduce",
    "any_rank",
    "ddp_barrier",
    "ddp_broadcast",
    "if_main_process",
    "rank",
    "world_size",
]


def rank() -> int:
    """Return the rank of this process."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def _device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set on any rank."""
    if not is_distributed_initialized():
        return flags
    return tuple(bool(total) for total in all_reduce([float(flag) for flag in flags]))


def all_reduce(values: list[float]) -> list[float]:
    """Sum each value over all processes."""
    if not is_distributed_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, ordered by rank."""
    if not is_distributed_initialized():
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
