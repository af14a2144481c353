"""The CUDA extension ``voco_kernels._C``, which ``setup.py`` builds from ``csrc/`` for Hopper."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from voco_kernels.compiler import assume_constant_result


def load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it can't be imported."""
    try:
        return import_module("voco_kernels._C"), ""
    except ModuleNotFoundError:
        return None, (
            "expected the CUDA extension voco_kernels._C, got none; run pip install -e . where there is "
            "an nvcc 12.5 or newer"
        )
    except ImportError as error:
        return None, f"the CUDA extension can't be imported: {error}"


@assume_constant_result
def is_hopper(device: torch.device | int) -> bool:
    """Whether the extension's kernels run on this CUDA device."""
    return torch.cuda.get_device_capability(device) == (9, 0)
