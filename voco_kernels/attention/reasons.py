"""Checks shared by several backends' ``unsupported``."""

from __future__ import annotations

import torch
from torch import Tensor


def strided_reasons(*tensors: Tensor) -> list[str]:
    """The reason, if any, that some tensor's last dimension isn't contiguous."""
    if all(tensor.stride(-1) == 1 for tensor in tensors):
        return []
    strides = ", ".join(str(tuple(tensor.stride())) for tensor in tensors)
    return [f"expected q, k and v with a contiguous last dimension, got strides {strides}"]


def dtype_reasons(tensor: Tensor, *supported: torch.dtype) -> list[str]:
    """The reason, if any, that the tensor's dtype isn't supported."""
    if tensor.dtype in supported:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
    return [f"expected {names}, got {str(tensor.dtype).removeprefix('torch.')}"]
