"""Importing the CUDA extension ``voco_kernels._C``, which setup.py builds from ``csrc/`` for sm_90a."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from voco_kernels.compiler import assume_constant_result


def load() -> tuple[Any, str]:
    """The extension module and "", or None and the reason why it can't be imported."""
    try:
        return import_module(f"{__package__}._C"), ""
    except ModuleNotFoundError:
        return None, (
            "the CUDA extension voco_kernels._C is not built; run pip install -e . with nvcc 12.5 or "
            "newer"
        )
    except ImportError as error:
        return None, f"the CUDA extension can't be imported: {error}"


@assume_constant_result
def is_hopper(device: torch.device | int) -> bool:
    """Whether the extension's kernels run on this CUDA device."""
    return torch.cuda.get_device_capability(device) == (9, 0)
