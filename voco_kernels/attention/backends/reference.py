"""The reference backend, which specifies the results: eager attention with the dense mask.

It runs in any floating-point dtype of 16 bits or more, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels.attention.reasons import dtype_reasons
from voco_kernels.layout import MaskLayout


def missing() -> list[str]:
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    return dtype_reasons(q, torch.float64, torch.float32, torch.float16, torch.bfloat16)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _grouped(q, k, v, layout)
    hidden = _hidden(layout)
    scores = _scores(q, k, scale).masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().masked_fill(hidden, 0).to(v.dtype) @ v
    return out.flatten(1, 2), lse.flatten(1, 2)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: MaskLayout,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [tensor.shape for tensor in (q, k, v)]
    dout, out, lse = (tensor.unflatten(1, (k.shape[1], -1)) for tensor in (dout, out, lse))
    q, k, v = _grouped(q, k, v, layout)
    hidden, padding = _hidden(layout), lse.isneginf()[..., None]
    p = (_scores(q, k, scale) - lse[..., None]).exp().masked_fill(hidden, 0)
    dout, out = dout.masked_fill(padding, 0), out.masked_fill(padding, 0)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.view_as(delta)
    dp = (dout @ v.mT).to(p.dtype)
    ds = (p * (dp - delta[..., None]) * scale).masked_fill(hidden, 0).to(q.dtype)
    dv = (p.to(v.dtype).mT @ dout).sum(2)
    return (ds @ k).view(shapes[0]), (ds.mT @ q).sum(2).view(shapes[1]), dv.view(shapes[2])


def _grouped(q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout) -> list[Tensor]:
    """q as ``[B, Hkv, group, S, D]``, k and v as ``[B, Hkv, 1, S, D]``. Padding can hold anything, so it
    is zeroed: otherwise 0 * NaN would spread to other tokens."""
    padding = (layout.visible_until == 0)[:, None, :, None]
    q, k, v = (tensor.masked_fill(padding, 0) for tensor in (q, k, v))
    return [q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale


def _hidden(layout: MaskLayout) -> Tensor:
    return ~layout.materialize()[:, None, None]
