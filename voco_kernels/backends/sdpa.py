"""PyTorch's own fused attention, one or two calls a run of the schedule: the default on the CPU.

The queries of a run see some keys in front of them, all of these, and then each other, causally. One
image is two runs: ``[vision | VoCo]`` over itself, then text over ``[VoCo | text]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from voco_kernels.dispatch import dtype_reasons, strided_reasons
from voco_kernels.layout import MaskLayout

_aten = torch.ops.aten
_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU_DTYPES = (*_CUDA_DTYPES, torch.float64)


def missing() -> list[str]:
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    if q.device.type not in ("cpu", "cuda"):
        return [
            f"expected tensors on cpu or cuda, where PyTorch's attention has lse, got {q.device}"
        ]
    dtypes = _CPU_DTYPES if q.device.type == "cpu" else _CUDA_DTYPES
    return dtype_reasons(q, *dtypes) + strided_reasons(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=lse_dtype, device=q.device)
    for run in _runs(layout):
        parts = []
        for keys, causal, idle in run.calls():
            # Queries that only fill the square of a causal call: the keys' own, their rows dropped.
            queries = keys if idle else run.own
            call = run.take(queries, q) + run.take(keys, k, v)
            parts.append([result[:, :, idle:] for result in _attend(*call, scale, causal)])
        run_out, run_lse = parts[0] if len(parts) == 1 else _merge(*parts[0], *parts[1])
        out[run.rows, :, run.own], lse[run.rows, :, run.own] = run_out, run_lse
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
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[-1]
    # Several runs add to a kept key's gradients, which in 16 bits would be rounded each time.
    sums = torch.promote_types(k.dtype, torch.float32)
    dq, dk, dv = (
        torch.zeros_like(q),
        torch.zeros_like(k, dtype=sums),
        torch.zeros_like(v, dtype=sums),
    )
    if dlse is not None:
        dout, q, k, v, out = _with_dlse(dlse, dout, q, k, v, out)
    for run in _runs(layout):
        for keys, causal, idle in run.calls():
            queries = run.take(run.own, dout, q, out, lse)
            if idle:
                # No gradient comes from a query with lse = inf: its probabilities are 0.
                dout_q_out = [F.pad(tensor, (0, 0, idle, 0)) for tensor in queries[:3]]
                queries = [*dout_q_out, F.pad(queries[3], (idle, 0), value=float("inf"))]
            gradients = _attend_backward(*queries, *run.take(keys, k, v), scale, causal)
            dq_run, dk_run, dv_run = (gradient[..., :head_dim] for gradient in gradients)
            dq[run.rows, :, run.own] += dq_run[:, :, idle:]
            dk[run.rows, :, keys] += dk_run
            dv[run.rows, :, keys] += dv_run
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _Run(NamedTuple):
    """A run of some rows of the batch; positions are a slice, or int64 ``[n]`` where gathered."""

    rows: slice
    own: slice
    in_front: slice | Tensor
    num_in_front: int

    def calls(self) -> list[tuple[slice | Tensor, bool, int]]:
        """Keys, is_causal and number of idle queries of the attention calls that make up the run.

        A causal call wants as many queries as keys, so one call wastes ``num_in_front**2 / 2`` pairs on
        idle queries. Two calls waste none, but read the queries and write their results twice. Measured
        on CPUs (fp32 and bf16, 114 to 2000 queries), that costs as much as 16 pairs for each query.
        """
        num_own = self.own.stop - self.own.start
        if self.num_in_front == 0:
            return [(self.own, True, 0)]
        if self.num_in_front**2 > 32 * num_own:
            return [(self.in_front, False, 0), (self.own, True, 0)]
        if isinstance(self.in_front, slice):
            return [(slice(self.in_front.start, self.own.stop), True, self.num_in_front)]
        positions = torch.arange(self.own.start, self.own.stop, device=self.in_front.device)
        return [(torch.cat([self.in_front, positions]), True, self.num_in_front)]

    def take(self, positions: slice | Tensor, *tensors: Tensor) -> list[Tensor]:
        return [tensor[self.rows, :, positions] for tensor in tensors]


def _runs(layout: MaskLayout) -> Iterator[_Run]:
    """The runs that see anything; those that are the same in neighbouring rows, once."""
    kept = layout.schedule.kept.long()
    host_kept = kept.cpu().numpy()
    rows_of_run: dict[tuple, list[int]] = {}
    for row, start, stop, key_start, *prefix, _, _ in layout.schedule.host_runs():
        if key_start < stop:  # else padding
            prefix_keys = host_kept[row, slice(*prefix)].tobytes()
            run = (start, stop, key_start, *prefix, prefix_keys)
            rows_of_run.setdefault(run, []).append(row)
    for (start, stop, key_start, *prefix, _), rows in rows_of_run.items():
        in_front = slice(key_start, start)
        num_in_front = start - key_start + prefix[1] - prefix[0]
        if prefix[0] < prefix[1]:
            positions = torch.arange(key_start, start, device=kept.device)
            in_front = torch.cat([kept[rows[0], slice(*prefix)], positions])
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        for group in (
            [slice(rows[0], rows[-1] + 1)] if neighbours else [slice(r, r + 1) for r in rows]
        ):
            yield _Run(group, slice(start, stop), in_front, num_in_front)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each."""
    both = torch.logaddexp(lse, other_lse)
    weight = (lse - both).exp()[..., None]
    return torch.lerp(other.to(both.dtype), out.to(both.dtype), weight), both


def _with_dlse(dlse: Tensor, dout: Tensor, *q_k_v_out: Tensor) -> list[Tensor]:
    """More columns, with which aten's backward, who knows no dlse, computes the gradients with it.

    It is ``ds = p * (dp - delta + dlse)`` where ``dp = dout v^T`` and ``delta = sum(dout * out)``. So dlse
    goes into columns of dout that meet ones in v and zeros in out; in q and k they are zeros. In 16 bits
    a second column takes what rounding cut off the first.
    """
    columns, rest = [], dlse
    for _ in range(1 if dout.dtype == dlse.dtype else 2):
        columns.append(rest.to(dout.dtype))
        rest = rest - columns[-1]
    extra = len(columns)
    q, k, v, out = (
        F.pad(tensor, (0, extra), value=value)
        for tensor, value in zip(q_k_v_out, (0.0, 0.0, 1.0, 0.0), strict=True)
    )
    return [torch.cat([dout, torch.stack(columns, dim=-1)], dim=-1), q, k, v, out]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse of plain attention; a causal query ``i`` sees the keys up to ``i``."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    queries, head_dim = q.shape[2:]
    k, v = (_repeat_heads(tensor, q.shape[1]) for tensor in (k, v))
    q, k, v = (_for_cutlass(tensor) for tensor in (q, k, v))
    out, lse, *_ = _aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, int(causal), True, scale=scale
    )
    return out[..., :head_dim].transpose(1, 2), lse[..., :queries]


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of ``_attend``."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    (queries, head_dim), kv_heads = q.shape[2:], k.shape[1]
    k, v = (_repeat_heads(tensor, q.shape[1]) for tensor in (k, v))
    # Its lse has rows of a multiple of 32 queries, and inf behind the last.
    lse = F.pad(lse, (0, -queries % 32), value=float("inf")).contiguous()
    dout, q, k, v, out = (_for_cutlass(tensor) for tensor in (dout, q, k, v, out))
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    # One split of the keys: with more, atomics would add up dq in any order.
    gradients = _aten._efficient_attention_backward(
        dout, q, k, v, None, out, None, None, queries, k.shape[1], lse, 0.0, no_dropout, no_dropout,
        int(causal), False, scale=scale, num_splits_key=1,
    )  # fmt: skip
    dq, dk, dv = (gradient[..., :head_dim].transpose(1, 2) for gradient in gradients[:3])
    if kv_heads != dq.shape[1]:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.float32) for t in (dk, dv))
    return dq, dk, dv


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    repeats = heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _for_cutlass(tensor: Tensor) -> Tensor:
    """``[B, S, H, D]``, each row of D padded to, and starting at, a multiple of 16 bytes."""
    aligned = 16 // tensor.element_size()
    tensor = F.pad(tensor, (0, -tensor.shape[-1] % aligned)).transpose(1, 2)
    strides_fit = all(stride % aligned == 0 for stride in tensor.stride()[:3])
    return tensor if strides_fit and tensor.data_ptr() % 16 == 0 else tensor.contiguous()
