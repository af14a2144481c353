"""Where a model is put."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The GPU of this process under torchrun or accelerate, the first one alone, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
