"""PyTorch's own fused attention, a few calls a layout: the default on the CPU, a fallback on CUDA.

The queries of a run (see ``schedule.py``) see some keys in front of them, all of these, and then
each other, causally. One image is two runs: ``[vision | VoCo]``, then text over ``[VoCo | text]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from voco_kernels.attention.reasons import dtype_reasons, strided_reasons
from voco_kernels.layout import MaskLayout

_aten = torch.ops.aten
_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU_DTYPES = (*_CUDA_DTYPES, torch.float64)

_CAUSAL_FROM_THE_END = 2  # a custom_mask_type of aten's memory-efficient attention

# aten's causal CPU kernel skips hidden keys 512 at a time, and only where queries and keys start
# together. So a run goes through it in chunks of queries, over the keys up to the chunk's last; a
# long run with no keys in front goes through whole. Both numbers are measured, 64 to 3000 tokens.
_CHUNK = 192
_LONG = 1024


def missing() -> list[str]:
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    if q.device.type not in ("cpu", "cuda"):
        return [f"expected tensors on cpu or cuda, where aten's attention has lse, got {q.device}"]
    dtypes = _CPU_DTYPES if q.device.type == "cpu" else _CUDA_DTYPES
    return dtype_reasons(q, *dtypes) + strided_reasons(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype)
    for run in _runs(layout):
        keys, values = run.take(run.keys, k, v)
        for own, seen in run.chunks(q.device):
            (queries,) = run.take(own, q)
            out[run.rows, :, own], lse[run.rows, :, own] = _attend(
                queries, keys[:, :, :seen], values[:, :, :seen], scale
            )
    return out, lse


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
    head_dim, dtype = q.shape[-1], q.dtype
    # Sums over chunks in 16 bits would be rounded each time. aten's CPU kernel rounds its own like
    # that, beyond the error that is allowed here, so there 16 bits are widened altogether.
    sums = torch.promote_types(dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(tensor, dtype=sums) for tensor in (q, k, v))
    if q.device.type == "cpu":
        dout, q, k, v, out = (tensor.to(sums) for tensor in (dout, q, k, v, out))
    if dlse is not None:
        dout, q, k, v, out = _with_dlse(dlse, dout, q, k, v, out)
    for run in _runs(layout):
        keys, values, dkeys, dvalues = run.take(run.keys, k, v, dk, dv)
        for own, seen in run.chunks(q.device):
            own_dout, own_q, own_out, own_lse = run.take(own, dout, q, out, lse)
            gradients = _attend_backward(
                own_dout, own_q, own_out, own_lse, keys[:, :, :seen], values[:, :, :seen], scale
            )
            own_dq, own_dk, own_dv = (gradient[..., :head_dim] for gradient in gradients)
            dq[run.rows, :, own] = own_dq
            dkeys[:, :, :seen] += own_dk
            dvalues[:, :, :seen] += own_dv
        if not isinstance(run.keys, slice):  # then dkeys and dvalues are copies
            dk[run.rows, :, run.keys], dv[run.rows, :, run.keys] = dkeys, dvalues
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class _Run(NamedTuple):
    """A run of some rows of the batch. ``keys`` ends with the run's own tokens: a slice, or int64
    positions where its first keys come out of ``kept``."""

    rows: slice
    own: slice
    keys: slice | Tensor
    num_in_front: int

    def chunks(self, device: torch.device) -> Iterator[tuple[slice, int]]:
        """The run's queries bit by bit, and how many of its keys the last query of each sees."""
        start, stop, _ = self.own.indices(self.own.stop)
        whole = device.type != "cpu" or (self.num_in_front == 0 and stop - start > _LONG)
        step = stop - start if whole else _CHUNK
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield slice(first, last), self.num_in_front + last - start

    def take(self, positions: slice | Tensor, *tensors: Tensor) -> list[Tensor]:
        """``[rows, H, positions, D]`` of each: views, or copies where positions is a tensor."""
        return [tensor[self.rows, :, positions] for tensor in tensors]


def _runs(layout: MaskLayout) -> Iterator[_Run]:
    """The runs that see anything; those that are the same in neighbouring rows only once."""
    kept = layout.schedule.kept
    host_kept = kept.cpu().numpy()
    rows_of_run: dict[tuple, list[int]] = {}
    for row, start, stop, key_start, prefix_start, prefix_stop, *_ in layout.schedule.host_runs():
        if key_start < stop:  # otherwise padding
            prefix = host_kept[row, prefix_start:prefix_stop].tobytes()
            run = (start, stop, key_start, prefix_start, prefix_stop, prefix)
            rows_of_run.setdefault(run, []).append(row)
    for (start, stop, key_start, prefix_start, prefix_stop, _), rows in rows_of_run.items():
        keys: slice | Tensor = slice(key_start, stop)
        if prefix_start < prefix_stop:
            contiguous = torch.arange(key_start, stop, device=kept.device)
            keys = torch.cat([kept[rows[0], prefix_start:prefix_stop], contiguous])
        num_in_front = prefix_stop - prefix_start + start - key_start
        together = rows[-1] - rows[0] == len(rows) - 1
        for group in [rows] if together else [[row] for row in rows]:
            yield _Run(slice(group[0], group[-1] + 1), slice(start, stop), keys, num_in_front)


def _with_dlse(dlse: Tensor, dout: Tensor, *q_k_v_out: Tensor) -> list[Tensor]:
    """More columns, by which aten's backward, that knows no dlse, gives the gradients with it.

    It is ``ds = p * (dp - delta + dlse)`` with ``dp = dout v^T`` and ``delta = sum(dout * out)``.
    So dlse goes into columns of dout that meet ones in v and zeros in out; in q and k they are
    zeros. In 16 bits a second column takes what rounding cut off the first.
    """
    columns, rest = [], dlse
    for _ in range(1 if dout.dtype == dlse.dtype else 2):
        columns.append(rest.to(dout.dtype))
        rest = rest - columns[-1]
    values = (0.0, 0.0, 1.0, 0.0)
    return [
        torch.cat([dout, torch.stack(columns, dim=-1)], dim=-1),
        *(F.pad(t, (0, len(columns)), value=x) for t, x in zip(q_k_v_out, values, strict=True)),
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of causal attention where the last query sees all keys, the one before it one key
    less, and so on."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, scale=scale, **_causal(q, k)
        )
    queries, head_dim = q.shape[2:]
    q, k, v = (_for_cutlass(tensor, q.shape[1]) for tensor in (q, k, v))
    out, lse, *_ = _aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, _CAUSAL_FROM_THE_END, True, scale=scale
    )
    return out[..., :head_dim].transpose(1, 2), lse[..., :queries]


def _attend_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of ``_attend``."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, scale=scale, **_causal(q, k)
        )
    queries, head_dim = q.shape[2:]
    heads, kv_heads = q.shape[1], k.shape[1]
    # Its lse is as long as a multiple of 32 queries, with inf behind the last.
    lse = F.pad(lse, (0, -queries % 32), value=float("inf")).contiguous()
    dout, q, k, v, out = (_for_cutlass(tensor, heads) for tensor in (dout, q, k, v, out))
    out = out.contiguous()  # the kernel takes heads * D for the stride between its queries
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    # With more than one split of the keys, atomics would add up dq, in any order.
    gradients = _aten._efficient_attention_backward(
        dout, q, k, v, None, out, None, None, queries, k.shape[1], lse, 0.0, no_dropout, no_dropout,
        _CAUSAL_FROM_THE_END, False, scale=scale, num_splits_key=1,
    )  # fmt: skip
    dq, dk, dv = (gradient[..., :head_dim].transpose(1, 2) for gradient in gradients[:3])
    if heads != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.float32) for t in (dk, dv))
    return dq, dk, dv


def _causal(q: Tensor, k: Tensor) -> dict[str, bool | Tensor]:
    """What tells aten's CPU kernel, whose own causal masks begin with the first query and the first
    key, to end with the last of both: for a chunk, a bias ``[queries, keys]``."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return {"is_causal": True}
    bias = q.new_full((queries, keys), float("-inf")).triu_(keys - queries + 1)
    return {"is_causal": False, "attn_mask": bias}


def _for_cutlass(tensor: Tensor, heads: int) -> Tensor:
    """``[B, S, heads, D]``, keys and values repeated for their group of heads, each row of D padded
    to, and starting at, a multiple of 16 bytes."""
    tensor = tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
    aligned = 16 // tensor.element_size()
    tensor = F.pad(tensor, (0, -tensor.shape[-1] % aligned)).transpose(1, 2)
    strides_fit = all(stride % aligned == 0 for stride in tensor.stride()[:3])
    return tensor if strides_fit and tensor.data_ptr() % 16 == 0 else tensor.contiguous()
