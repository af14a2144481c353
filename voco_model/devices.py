"""The devices of this machine: which one to use by default, and whether a named one works."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def default_device() -> torch.device:
    """The GPU of this process under torchrun or accelerate, else the first GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of this name, or ``default_device()`` for None.

    Raises:
        ValueError: an unknown device, one that isn't there, or ``meta``, which holds no data.
    """
    if device is None:
        return default_device()
    try:
        named = torch.device(device)
        torch.ones(1, device=named).item()
    except (RuntimeError, AssertionError) as error:
        here = ["cpu"]
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            count = torch.accelerator.device_count()
            here += [f"{accelerator.type}:{number}" for number in range(count)]
        raise ValueError(
            f"expected a device that this machine has ({', '.join(here)}), got {str(device)!r}"
        ) from error
    return named


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
