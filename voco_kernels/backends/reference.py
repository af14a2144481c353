"""The specification: eager attention under the dense mask, in any dtype, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels.layout import MaskLayout


def missing() -> list[str]:
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _grouped(q, k, v, layout)
    scores = _scores(q, k, layout, scale)
    lse = scores.logsumexp(-1)
    out = _probabilities(scores, lse).to(v.dtype) @ v
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
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [tensor.shape for tensor in (q, k, v)]
    dout, out, lse = (tensor.unflatten(1, (k.shape[1], -1)) for tensor in (dout, out, lse))
    q, k, v = _grouped(q, k, v, layout)
    p = _probabilities(_scores(q, k, layout, scale), lse)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.view_as(delta)
    seen = p > 0
    ds = torch.where(seen, p * ((dout @ v.mT).to(p.dtype) - delta[..., None]) * scale, 0).to(
        q.dtype
    )
    dv = (p.to(v.dtype).mT @ dout.masked_fill(lse.isinf()[..., None], 0)).sum(2)
    return (ds @ k).view(shapes[0]), (ds.mT @ q).sum(2).view(shapes[1]), dv.view(shapes[2])


def _grouped(q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout) -> list[Tensor]:
    """q as ``[B, Hkv, group, S, D]``, k and v as ``[B, Hkv, 1, S, D]``; padding, which may hold
    anything, zeroed so that 0 * NaN can't leak out of it."""
    padding = (layout.visible_until == 0)[:, None, :, None]
    q, k, v = (tensor.masked_fill(padding, 0) for tensor in (q, k, v))
    return [q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)]


def _scores(q: Tensor, k: Tensor, layout: MaskLayout, scale: float) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores.masked_fill(~layout.materialize()[:, None, None], float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.where(scores.isinf(), 0, (scores - lse[..., None]).exp())
