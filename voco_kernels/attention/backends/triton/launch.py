"""Host side of the Triton backend: support checks, and the launches (one forward, three backward)."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from voco_kernels import interpreter
from voco_kernels.attention.backends.triton.config import Config, config
from voco_kernels.attention.reasons import dtype_reasons, strided_reasons
from voco_kernels.compiler import assume_constant_result
from voco_kernels.layout import MaskLayout
from voco_kernels.layout.schedule import TILE

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

_LARGEST_HEAD_DIM = 256
_WIDEST_STRIDE = 2**31 // TILE  # between tokens: offsets within a tile are int32
# Read once, on import, because torch.compile can't trace either. Triton reads TRITON_INTERPRET then too.
_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> list[str]:
    if not _INSTALLED:
        return ["triton is not installed; CUDA builds of torch include it"]
    if not torch.cuda.is_available() and not _INTERPRETED:
        return [f"no CUDA device; {interpreter.HINT}"]
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    reasons = dtype_reasons(q, torch.bfloat16, torch.float16, torch.float32)
    reasons += strided_reasons(q, k, v)
    if q.device.type != "cuda" and not _INTERPRETED:
        reasons.append(f"expected tensors on CUDA, got {q.device}")
    if q.device.type == "cuda" and _capability(q.device) < 80:
        reasons.append(
            f"expected compute capability 8.0 or later, got {_capability(q.device) / 10}"
        )
    if q.shape[-1] > _LARGEST_HEAD_DIM:
        reasons.append(f"expected head_dim up to {_LARGEST_HEAD_DIM}, got {q.shape[-1]}")
    if any(tensor.stride(2) >= _WIDEST_STRIDE for tensor in (q, k, v)):
        strides = ", ".join(str(tuple(tensor.stride())) for tensor in (q, k, v))
        reasons.append(
            f"expected token strides below {_WIDEST_STRIDE} elements, got strides {strides}; call "
            ".contiguous()"
        )
    if _INTERPRETED and not reasons:
        reasons += interpreter.attention_reasons(q.dtype)
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    from voco_kernels.attention.backends.triton.forward_kernel import forward_kernel

    batch, heads, length, head_dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    blocks = _config("forward", q)
    with _device(q):
        forward_kernel[(_programs(layout, heads, blocks.block_m),)](
            q, k, v, *_descriptors(blocks.block_m, q), *_descriptors(blocks.block_n, k, v), out, lse,
            layout.schedule.query_tiles, layout.schedule.counts, layout.schedule.kept,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            scale, heads, heads // k.shape[1], length,
            **_constants(q, blocks),
        )  # fmt: skip
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
    from voco_kernels.attention.backends.triton import backward_kernels as kernels

    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    schedule = layout.schedule
    delta = torch.empty_like(lse)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with _device(q):
        kernels.delta_kernel[(batch * heads, -(-length // 64))](
            out, dout, dlse if dlse is None else dlse.contiguous(), delta,
            *out.stride()[:3], *dout.stride()[:3], heads, length,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=64, HAS_DLSE=dlse is not None,
        )  # fmt: skip
        blocks = _config("dkdv", q)
        kernels.dkdv_kernel[(_programs(layout, kv_heads, blocks.block_n),)](
            q, k, v, *_descriptors(blocks.block_m, q, dout), dout, lse, delta, dk, dv,
            schedule.key_tiles, schedule.counts, schedule.kept, schedule.readers,
            layout.visible_from,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3],
            scale, kv_heads, heads // kv_heads, length,
            **_constants(q, blocks),
        )  # fmt: skip
        blocks = _config("dq", q)
        kernels.dq_kernel[(_programs(layout, heads, blocks.block_m),)](
            q, k, v, *_descriptors(blocks.block_n, k, v), dout, lse, delta, dq,
            schedule.query_tiles, schedule.counts, schedule.kept,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
            *dq.stride()[:3],
            scale, heads, heads // kv_heads, length,
            **_constants(q, blocks),
        )  # fmt: skip
    return dq, dk, dv


def _descriptors(rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """TMA descriptors that load ``rows`` rows of a head, or None for each tensor: before sm_90, if an
    address or stride isn't a multiple of 16 bytes (as TMA needs), and for float32 (it would spill)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = all(
        tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )
    if not aligned or not (_INTERPRETED or _capability(tensors[0].device) >= 90):
        return [None] * len(tensors)
    block = [1, 1, rows, _block_d(tensors[0].shape[-1])]
    return [TensorDescriptor.from_tensor(tensor, block) for tensor in tensors]


def _programs(layout: MaskLayout, heads: int, block: int) -> int:
    """The number of programs to launch: the work items of a batch whose rows have two runs each (an
    image and its text). The kernels handle any number of items; reading it would be a host sync."""
    tiles = max(layout.length - 2, 0) // TILE + 2
    return layout.batch * tiles * heads * (TILE // block)


def _config(kernel: str, q: Tensor) -> Config:
    capability = _capability(q.device) if q.device.type == "cuda" else 80
    return config(kernel, q.shape[-1], q.element_size(), capability)


def _constants(q: Tensor, blocks: Config) -> dict[str, int | str]:
    """The compile-time arguments shared by the three attention kernels."""
    return dict(
        HEAD_DIM=q.shape[-1],
        BLOCK_D=_block_d(q.shape[-1]),
        TILE=TILE,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        PRECISION=blocks.precision,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@assume_constant_result
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _device(q: Tensor) -> Any:
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()
