"""The CUDA backend for Hopper (sm_90a), whose kernels are in ``csrc/``."""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels import extension
from voco_kernels.attention.reasons import dtype_reasons, strided_reasons
from voco_kernels.layout import MaskLayout

_LARGEST_HEAD_DIM = 256
_ALIGNMENT = 16  # bytes: TMA needs addresses and strides to be multiples of it
_OPERANDS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
# For larger head dims, csrc has a fused kernel that also computes dQ while it computes dK and dV. For
# smaller ones, dQ's atomic adds should take longer than the two products saved (not measured).
_WIDEST_WITHOUT_PASSING = 64


# Loaded on import because torch.compile can't trace it. Tests substitute one that runs on the CPU.
_extension, _why_not = extension.load()
_emulated = False


def missing() -> list[str]:
    if _extension is None:
        return [_why_not]
    if not _emulated and not any(map(extension.is_hopper, range(torch.cuda.device_count()))):
        return ["no CUDA device of compute capability 9.0"]
    return []


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    reasons = dtype_reasons(q, torch.bfloat16, torch.float16)
    reasons += strided_reasons(q, k, v)
    if q.device.type != "cuda" and not _emulated:
        reasons.append(f"expected tensors on CUDA, got {q.device}")
    if q.device.type == "cuda" and not extension.is_hopper(q.device):
        reasons.append(f"expected a device of compute capability 9.0, got {q.device}")
    head_dim = q.shape[-1]
    if head_dim > _LARGEST_HEAD_DIM or head_dim % 8:
        reasons.append(
            f"expected head_dim to be a multiple of 8 up to {_LARGEST_HEAD_DIM}, got {head_dim}"
        )
    if not all(map(_has_aligned_strides, (q, k, v))):
        strides = ", ".join(str(tuple(tensor.stride())) for tensor in (q, k, v))
        reasons.append(
            f"expected strides that are multiples of {_ALIGNMENT} bytes, got {strides} elements of "
            f"{q.element_size()} bytes; call .contiguous()"
        )
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch("attention_forward_sm90", q, k, v, layout, scale, out=out, lse=lse)
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
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # If the order of sums may vary, one kernel computes dQ, dK and dV: five products instead of seven.
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    in_passing = not deterministic and q.shape[-1] > _WIDEST_WITHOUT_PASSING
    _launch(
        "attention_backward_sm90",
        q,
        k,
        v,
        layout,
        scale,
        out=_aligned(out),
        dout=_aligned(dout),
        lse=lse.contiguous(),
        dlse=None if dlse is None else dlse.contiguous(),
        delta=torch.empty_like(lse, memory_format=torch.contiguous_format),
        dq_sum=q.new_empty(q.shape, dtype=torch.float32) if in_passing else None,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


def _launch(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: MaskLayout,
    scale: float,
    **tensors: Tensor | None,
) -> None:
    """Call a function of the extension on the current stream of q's device.

    ``tensors`` are for the fields of the same names in ``csrc/params.h``.
    """
    q, k, v = map(_aligned, (q, k, v))
    params = _extension.AttentionParams()
    params.batch, params.heads, params.length, params.head_dim = q.shape
    params.kv_heads = k.shape[1]
    params.bf16 = q.dtype == torch.bfloat16
    params.scale = scale
    for field, tensor in dict(q=q, k=k, v=v, **tensors).items():
        if tensor is None:
            continue
        if field in _OPERANDS:
            setattr(params, field, _extension.Tensor4(tensor.data_ptr(), *_steps(tensor)))
        else:
            setattr(params, field, tensor.data_ptr())
    params.visible_from = layout.visible_from.data_ptr()
    for field, tensor in layout.schedule._asdict().items():
        setattr(params, field, tensor.data_ptr())
    next_item = torch.empty(2, dtype=torch.int32, device=q.device)
    params.next_item = next_item.data_ptr()
    on_cuda = q.device.type == "cuda"
    params.device = q.device.index if on_cuda else 0
    stream = torch.cuda.current_stream(q.device).cuda_stream if on_cuda else 0
    getattr(_extension, name)(params, stream)


def _steps(tensor: Tensor) -> list[int]:
    """Strides of the first three dimensions; 0 for size 1, for which torch reports arbitrary strides."""
    sizes_and_strides = zip(tensor.shape[:3], tensor.stride(), strict=False)
    return [stride if size > 1 else 0 for size, stride in sizes_and_strides]


def _has_aligned_strides(tensor: Tensor) -> bool:
    return all(step * tensor.element_size() % _ALIGNMENT == 0 for step in _steps(tensor))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if TMA can't read it. Gradients from autograd can have any strides, and a
    view can start at any address, which ``unsupported`` can't see under torch.compile."""
    if _has_aligned_strides(tensor) and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
