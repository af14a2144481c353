"""The flash-attn backend (FlashAttention-2): one variable-length call, one sequence per run.

The runs are those of the layout's schedule (see ``schedule.py``). flash-attn aligns causal masks to the
last query and the last key, so each run can be a sequence: its queries are the run's, and its keys are
those of the run's prefix, gathered, and then the contiguous range that ends with the run.
"""

from __future__ import annotations

from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from voco_kernels.attention.reasons import dtype_reasons, strided_reasons
from voco_kernels.compiler import assume_constant_result
from voco_kernels.layout import MaskLayout


@assume_constant_result  # torch.compile can't trace an import
def missing() -> list[str]:
    try:
        _package()
    except ImportError as error:
        return [f"can't import flash-attn ({error}); pip install 'voco-kernels[flash-attn]'"]
    return [] if torch.cuda.is_available() else ["no CUDA device"]


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    reasons = dtype_reasons(q, torch.bfloat16, torch.float16) + strided_reasons(q, k, v)
    if q.device.type != "cuda":
        reasons.append(f"expected tensors on CUDA, got {q.device}")
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        reasons.append(f"expected compute capability 8.0 or later, got {capability}")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        reasons.append(f"expected head_dim to be a multiple of 8 up to 256, got {q.shape[-1]}")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    pack = _packing(layout)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
    if pack is None:
        return out, lse
    queries, keys, values = _gather(q, pack.queries), _gather(k, pack.keys), _gather(v, pack.keys)
    run_out, run_lse = _attend(queries, keys, values, pack, scale)
    out.transpose(1, 2)[pack.queries] = run_out
    lse.transpose(1, 2)[pack.queries] = run_lse.T
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
    pack = _packing(layout)
    if pack is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run_q, run_out, run_dout = (_gather(tensor, pack.queries) for tensor in (q, out, dout))
    run_k, run_v = (_gather(tensor, pack.keys) for tensor in (k, v))
    run_lse = _gather(lse, pack.queries).T.contiguous()
    saved = (run_q, run_k, run_v, run_out, run_lse, pack, scale)
    run_dq, run_dk, run_dv = (t.float() for t in _attend_backward(run_dout, *saved))
    if dlse is not None:
        # flash-attn's backward takes no dlse, which adds p * dlse to the gradient of the scores. Its
        # share of dq (times dlse) is attention with k in place of v; its share of dk is dv for a dout
        # of dlse * q.
        run_dlse = _gather(dlse, pack.queries)[..., None]
        attended_k, _ = _attend(run_q, run_k, run_k, pack, scale)
        _, _, attended_q = _attend_backward((run_dlse * run_q).to(q.dtype), *saved)
        run_dq += scale * run_dlse * attended_k
        run_dk += scale * attended_q
    dq = torch.zeros_like(q)
    dq.transpose(1, 2)[pack.queries] = run_dq.to(q.dtype)
    return dq, _scatter_add(run_dk, pack.keys, k), _scatter_add(run_dv, pack.keys, v)


class _Packing(NamedTuple):
    """The source of the packed sequences' tokens, as (rows, positions), and where sequences start."""

    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self[2:]


# Building one takes a host sync. All layers of a model share a layout, so it happens once per batch.
_packings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packing(layout: MaskLayout) -> _Packing | None:
    """The layout's packing, cached; None if all tokens are padding."""
    tiles = layout.schedule.query_tiles
    if tiles.is_inference():  # has no version counter, so writes to it can't be detected
        return _build_packing(layout)
    version, packing = _packings.get(tiles, (None, None))
    if version != tiles._version:
        packing = _build_packing(layout)
        _packings[tiles] = (tiles._version, packing)
    return packing


def _build_packing(layout: MaskLayout) -> _Packing | None:
    kept = layout.schedule.kept.cpu()
    queries, keys = [], []
    for row, start, stop, key_start, prefix_start, prefix_stop, *_ in layout.schedule.host_runs():
        if key_start < stop:  # otherwise padding
            prefix = kept[row, prefix_start:prefix_stop].long()
            queries.append((row, torch.arange(start, stop)))
            keys.append((row, torch.cat([prefix, torch.arange(key_start, stop)])))

    if not queries:
        return None

    def on_device(runs: list[tuple[int, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
        lengths = [len(positions) for _, positions in runs]
        rows = torch.tensor([row for row, _ in runs]).repeat_interleave(torch.tensor(lengths))
        positions = torch.cat([positions for _, positions in runs])
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        where = (rows.to(layout.device), positions.to(layout.device))
        return where, starts.to(layout.device), max(lengths)

    (query_index, cu_q, max_q), (key_index, cu_k, max_k) = on_device(queries), on_device(keys)
    return _Packing(query_index, key_index, cu_q, cu_k, max_q, max_k)


def _gather(tensor: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """Gather ``[tokens, H, ...]`` from ``[B, H, S, ...]``."""
    return tensor.transpose(1, 2)[index]


def _scatter_add(packed: Tensor, index: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """Sum ``[tokens, H, D]`` into ``[B, H, S, D]``, in a fixed order because index_put_ sorts."""
    total = torch.zeros_like(like, dtype=torch.float32)
    total.transpose(1, 2).index_put_(index, packed.float(), accumulate=True)
    return total.to(like.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, pack: _Packing, scale: float) -> tuple[Tensor, Tensor]:
    """out ``[tokens, H, D]`` and lse ``[H, tokens]``."""
    out, lse, *_ = _package()._flash_attn_varlen_forward(
        q, k, v, *pack.lengths(), dropout_p=0.0, softmax_scale=scale, causal=True
    )
    return out, lse


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: _Packing,
    scale: float,
) -> list[Tensor]:
    gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
    _package()._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *gradients, *pack.lengths(), dropout_p=0.0, softmax_scale=scale,
        causal=True, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=True,
    )  # fmt: skip
    return gradients


def _package() -> ModuleType:
    return import_module("flash_attn.flash_attn_interface")
