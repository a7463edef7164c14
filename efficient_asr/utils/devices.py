"""Devices: which one to run on, and which ones to time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from efficient_asr.utils.errors import UserError


def choose_device(name: str | None = None, option: str = "--device") -> str:
    """Return a device that can be used: the given one, or by default the GPU if there is one.

    Raises
    ------
    UserError
        If the name is invalid or there is no usable GPU, naming the option.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name, option)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option}: no usable GPU; use {option} cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{option}: there is no GPU {device.index}; this machine has {torch.cuda.device_count()}")
    return name


def named_device(name: str, option: str = "--device") -> torch.device:
    """Return a device by its name, whether or not this machine has it.

    Raises
    ------
    UserError
        If the name is invalid, naming the option.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"{option}: invalid device '{name}'; use 'cpu' or 'cuda'")
    return device


def devices_to_time(wanted: str | Sequence[str] | None, device: str, option: str = "runtime_devices") -> list[str]:
    """Return the devices on which runtimes are measured.

    Arguments
    ---------
    wanted : str, list of str or None
        `cpu`, `cuda`, a list of them, or `all` for those of this machine; None for the device of the run.
    device : str
        Device of the run.
    option : str
        Name of the key or option, for error messages.
    """
    if wanted is None:
        return [device]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == ["all"]:
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [choose_device(name, option) for name in dict.fromkeys(names)]


def clock(device: str = "cuda") -> float:
    """Return the time in seconds, when all work on the device is done."""
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.synchronize(device)
    return time.perf_counter()
