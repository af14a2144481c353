"""``torch.library`` operators that wrap the backends, with their fake kernels and autograd formulas.

The operators take the layout as plain tensors, so ``torch.compile`` sees no Python state: the lengths
in a layout can change without a recompile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from voco_kernels.attention.dispatch import load
from voco_kernels.layout import MaskLayout


@torch.library.custom_op("voco_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_from: Tensor,
    visible_until: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    counts: Tensor,
    kept: Tensor,
    readers: Tensor,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` from one backend; shapes and dtypes as in ``masked_attention``. ``deterministic``
    concerns only the gradients and is passed on to ``attention_backward``."""
    layout = MaskLayout.from_tensors(
        visible_from, visible_until, query_tiles, key_tiles, counts, kept, readers
    )
    out, lse = load(backend).forward(q, k, v, layout, scale)
    return _strided_like(out, q), lse


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, visible_from: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.custom_op("voco_kernels::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_from: Tensor,
    visible_until: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    counts: Tensor,
    kept: Tensor,
    readers: Tensor,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` from one backend."""
    layout = MaskLayout.from_tensors(
        visible_from, visible_until, query_tiles, key_tiles, counts, kept, readers
    )
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    gradients = load(backend).backward(dout, dlse, q, k, v, out, lse, layout, scale, deterministic)
    dq, dk, dv = (_strided_like(*pair) for pair in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, *layout_tensors, scale, backend, deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, *layout_tensors)
    ctx.options = scale, backend, deterministic
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *layout_tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 13
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = attention_backward(dout, dlse, q, k, v, out, lse, *layout_tensors, *ctx.options)
    return (*gradients, *(None,) * 10)


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _strided_like(result: Tensor, like: Tensor) -> Tensor:
    """``result`` with the strides that the fake kernel promised; copied only if they differ."""
    if result.stride() == torch.empty_like(like, device="meta").stride():
        return result
    return torch.empty_like(like).copy_(result)
