"""The device that a model computes on, also if Accelerate offloads its weights."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device for a module's inputs.

    With ``device_map``, offloaded weights stay on the meta device until Accelerate's hooks load them.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights are neither in memory nor on an accelerator between forward passes."""
    return any(parameter.is_meta for parameter in module.parameters())
