"""Validation of ``masked_attention``'s arguments, before a backend is chosen."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from voco_kernels.layout import MaskLayout


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: MaskLayout,
    scale: float | None,
    deterministic: bool,
) -> None:
    """Raise if the arguments break the contract in ``masked_attention``'s docstring.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, strides or devices don't match, or the scale isn't finite and positive.
        NotImplementedError: a tensor has a forward-mode tangent.
    """
    if not isinstance(layout, MaskLayout):
        raise TypeError(
            f"expected a MaskLayout, got {type(layout).__name__}; build one with "
            "MaskLayout.from_lengths, .from_spans, .from_input_ids or .packed"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"expected {name} as [batch, heads, length, head_dim], got {list(tensor.shape)}"
            )
        if tensor.device != layout.device:
            raise ValueError(
                f"expected {name} on the layout's device {layout.device}, got {tensor.device}; "
                "move one of them with .to(device)"
            )
        if not tensor.dtype.is_floating_point or tensor.dtype != q.dtype:
            raise TypeError(
                f"expected q, k and v in one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"expected {name} with a contiguous last dimension, got strides "
                f"{tuple(tensor.stride())}; call {name}.contiguous()"
            )
    batch, heads, length, head_dim = q.shape
    if (batch, length) != (layout.batch, layout.length):
        raise ValueError(
            f"expected q with the layout's batch {layout.batch} and length {layout.length}, got batch "
            f"{batch} and length {length} (q is {list(q.shape)})"
        )
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, length, head_dim) or v.shape != k.shape:
        raise ValueError(
            f"expected k and v of shape [{batch}, kv_heads, {length}, {head_dim}] to match q "
            f"{list(q.shape)}, got k {list(k.shape)} and v {list(v.shape)}"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            "expected a positive number of query heads divisible by the number of key/value heads, got "
            f"{heads} and {kv_heads}"
        )
    if head_dim == 0:
        raise ValueError(f"expected head_dim >= 1, got q of shape {list(q.shape)}")
    # A custom operator would drop the tangents silently.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in (q, k, v)
    ):
        raise NotImplementedError(
            "expected q, k and v without forward-mode tangents, got some that have them; "
            "differentiate in reverse mode (backward, or torch.func.grad outside torch.compile)"
        )
    if not isinstance(deterministic, bool):
        raise TypeError(
            f"expected deterministic as a bool, got {type(deterministic).__name__} {deterministic!r}"
        )
    if scale is not None and not (isinstance(scale, int | float) or _is_numpy_number(scale)):
        raise TypeError(f"expected scale as a number, got {type(scale).__name__} {scale!r}")
    if isinstance(scale, bool):
        raise TypeError(f"expected scale as a number, got bool {scale!r}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"expected a finite scale > 0, got {scale}")


def _is_numpy_number(value: object) -> bool:
    return isinstance(value, np.integer | np.floating)


def cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v to autocast's dtype if it is enabled, as SDPA does."""
    device = q.device.type
    if device == "meta":  # has no autocast, and is_autocast_enabled raises for it
        return q, k, v
    if torch.is_autocast_enabled(device) and q.dtype.is_floating_point and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.dtype.is_floating_point else t for t in (q, k, v))
    return q, k, v
