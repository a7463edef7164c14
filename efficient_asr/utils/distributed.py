"""Communication between the processes of a distributed run; no-ops in a single process.

SpeechBrain's functions are imported only in a distributed run: importing SpeechBrain takes over a second, which a command that
transcribes one file does not have to wait for.
"""

from __future__ import annotations

from typing import Any

import torch

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


def is_distributed_initialized() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def if_main_process() -> bool:
    """Whether this is the main process."""
    if not is_distributed_initialized():
        return True
    from speechbrain.utils import distributed

    return distributed.if_main_process()


def ddp_barrier() -> None:
    """Wait for all processes."""
    if is_distributed_initialized():
        from speechbrain.utils import distributed

        distributed.ddp_barrier()


def ddp_broadcast(value: Any, source: int = 0) -> Any:
    """Return the value of process `source`."""
    if not is_distributed_initialized():
        return value
    from speechbrain.utils import distributed

    return distributed.ddp_broadcast(value, source)


def rank() -> int:
    """Return the rank of this process."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def share(count: int) -> range:
    """Return the indices of `count` things that this process works on; together the processes work on all of them."""
    return range(rank(), count, world_size())


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
