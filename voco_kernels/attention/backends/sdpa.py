"""The SDPA backend: PyTorch's fused attention, called once or more for each run of the schedule.

It is the default on the CPU and a fallback on CUDA. All queries of a run (see ``schedule.py``) see the
same earlier keys, and each other causally. With one image there are two runs: ``[vision | VoCo]``, then
the text, which attends to ``[VoCo | text]``.
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

_CAUSAL_FROM_THE_END = 2  # custom_mask_type in aten's memory-efficient attention

# aten's CPU kernel skips masked keys in blocks of 512, and only if queries and keys start at the same
# token. So a run's queries are passed in chunks, each with the keys up to its last query; a long run
# with no earlier keys is passed whole. Both numbers were chosen by measurement, with 64 to 3000 tokens.
_CHUNK = 192
_LONG = 1024


def missing() -> list[str]:
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    if q.device.type not in ("cpu", "cuda"):
        return [f"expected tensors on cpu or cuda, where aten returns lse, got {q.device}"]
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
    # Sums over chunks are kept in float32, since in 16 bits each step would round. aten's CPU kernel
    # does round its 16-bit sums at each step, beyond our error bound, so there all inputs are widened.
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
        if not isinstance(run.keys, slice):  # dkeys and dvalues are copies
            dk[run.rows, :, run.keys], dv[run.rows, :, run.keys] = dkeys, dvalues
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class _Run(NamedTuple):
    """A run shared by some rows of the batch. ``own`` are its queries. ``keys``, which end with them,
    are a slice, or a tensor of positions if the first keys come from ``kept``."""

    rows: slice
    own: slice
    keys: slice | Tensor
    num_in_front: int

    def chunks(self, device: torch.device) -> Iterator[tuple[slice, int]]:
        """Chunks of the run's queries, each with the number of keys that its last query sees."""
        start, stop, _ = self.own.indices(self.own.stop)
        whole = device.type != "cpu" or (self.num_in_front == 0 and stop - start > _LONG)
        step = stop - start if whole else _CHUNK
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield slice(first, last), self.num_in_front + last - start

    def take(self, positions: slice | Tensor, *tensors: Tensor) -> list[Tensor]:
        """``[rows, H, positions, D]`` of each tensor: views, or copies if positions is a tensor."""
        return [tensor[self.rows, :, positions] for tensor in tensors]


def _runs(layout: MaskLayout) -> Iterator[_Run]:
    """The runs that see any key. Identical runs of consecutive rows are yielded as one."""
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
    """Append columns with which aten's backward, which takes no dlse, includes it in the gradients.

    The gradient is ``ds = p * (dp - delta + dlse)`` with ``dp = dout v^T`` and
    ``delta = sum(dout * out)``. So dout gets columns that hold dlse; the matching columns are ones in v
    and zeros in out, q and k. In 16 bits, a second column holds the rounding error of the first.
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
    """out and lse of causal attention in which the last query sees all keys, the one before it all but
    the last key, and so on."""
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
    """dq, dk and dv for ``_attend``."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, scale=scale, **_causal(q, k)
        )
    queries, head_dim = q.shape[2:]
    heads, kv_heads = q.shape[1], k.shape[1]
    # The kernel expects lse to be padded with inf to a multiple of 32 queries.
    lse = F.pad(lse, (0, -queries % 32), value=float("inf")).contiguous()
    dout, q, k, v, out = (_for_cutlass(tensor, heads) for tensor in (dout, q, k, v, out))
    out = out.contiguous()  # the kernel assumes a stride of heads * D between its queries
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    # With more than one split of the keys, dq would be summed by atomics, in any order.
    gradients = _aten._efficient_attention_backward(
        dout, q, k, v, None, out, None, None, queries, k.shape[1], lse, 0.0, no_dropout, no_dropout,
        _CAUSAL_FROM_THE_END, False, scale=scale, num_splits_key=1,
    )  # fmt: skip
    dq, dk, dv = (gradient[..., :head_dim].transpose(1, 2) for gradient in gradients[:3])
    if heads != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.float32) for t in (dk, dv))
    return dq, dk, dv


def _causal(q: Tensor, k: Tensor) -> dict[str, bool | Tensor]:
    """Arguments for a causal mask aligned to the last query and the last key. aten's CPU kernel aligns
    its own to the first of both, so if there are more keys, this is a bias ``[queries, keys]``."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return {"is_causal": True}
    bias = q.new_full((queries, keys), float("-inf")).triu_(keys - queries + 1)
    return {"is_causal": False, "attn_mask": bias}


def _for_cutlass(tensor: Tensor, heads: int) -> Tensor:
    """``[B, S, heads, D]``, with keys and values repeated for the query heads of their group, and with
    rows of D that are padded to, and start at, a multiple of 16 bytes."""
    tensor = tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
    aligned = 16 // tensor.element_size()
    tensor = F.pad(tensor, (0, -tensor.shape[-1] % aligned)).transpose(1, 2)
    strides_fit = all(stride % aligned == 0 for stride in tensor.stride()[:3])
    return tensor if strides_fit and tensor.data_ptr() % 16 == 0 else tensor.contiguous()
