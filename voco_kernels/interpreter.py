"""Checks that Triton's interpreter (``TRITON_INTERPRET=1``) computes correctly with a dtype.

With some versions of Triton and NumPy it returns wrong numbers without an error. Instead of comparing
version numbers, the first use of a dtype solves a small problem whose answer is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from voco_kernels.compiler import assume_constant_result
from voco_kernels.kv.move import Move
from voco_kernels.layout import MaskLayout

HINT = (
    "TRITON_INTERPRET=1, set before the start, runs it on the CPU, slowly, for tests, in dtypes that "
    "Triton's interpreter gets right (float32 and float16 from Triton 3.7 on)"
)


@assume_constant_result
def attention_reasons(dtype: torch.dtype) -> list[str]:
    """The reasons why attention kernels can't be interpreted in this dtype; empty if they can."""
    return list(_reasons(_attention_error, dtype))


def loader_reasons(move: Move) -> list[str]:
    """The reasons why the loader's kernel can't be interpreted for a move; empty if it can."""
    # Keys are rotated in float32, whatever the entry's dtype.
    rotated = move.entry_dtype == move.cache_dtype and move.inv_freq is not None
    entry_dtype = torch.float32 if rotated else move.entry_dtype
    return list(_reasons(_loader_error, entry_dtype, move.cache_dtype))


@cache
def _reasons(error_of: Callable[..., float], *dtypes: torch.dtype) -> tuple[str, ...]:
    import numpy
    import triton

    names = " to ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    try:
        # The caller may have autocast, fake tensors or another default device active.
        with (
            _disable_current_modes(),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about overflows in integer arithmetic on bits
            error = error_of(*dtypes)
    except Exception as raised:  # the interpreter may fail in any way, which is the reason returned
        cause = raised.__cause__ or raised
        return (
            f"Triton {triton.__version__}'s interpreter fails with NumPy {numpy.__version__} in {names} "
            f"({type(cause).__name__}: {cause}); use Triton 3.7 or later, or another backend or loader",
        )
    if error <= 1:
        return ()
    return (
        f"Triton {triton.__version__}'s interpreter computes {names} wrong (an error of {error:.2g}, "
        "where rounding allows 1); use float32 or float16, or another backend or loader",
    )


def _attention_error(dtype: torch.dtype) -> float:
    """The largest error of a small problem, forward and backward, as a multiple of the tolerance."""
    from voco_kernels.attention.backends import triton

    layout = MaskLayout.from_spans(
        [[("vision", 9), ("voco", 2), ("text", 7), ("vision", 5), ("voco", 1), ("text", 4)]]
    )
    q, k, v, dout = (_wave(seed, 1, 1, layout.length, 16).to(dtype) for seed in range(1, 5))
    scale = 0.5
    out, lse = triton.forward(q, k, v, layout, scale)
    found = (out, *triton.backward(dout, None, q, k, v, out, lse, layout, scale))

    with torch.enable_grad():
        leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
        mask = layout.materialize()[:, None]
        scores = (leaves[0] @ leaves[1].mT * scale).masked_fill(~mask, float("-inf"))
        exact = scores.softmax(-1) @ leaves[2]
        truth = (exact, *torch.autograd.grad(exact, leaves, dout.double()))
    unit = 16 * torch.finfo(dtype).eps
    errors = [
        (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        for ours, theirs in zip(found, truth, strict=True)
    ]
    return float(torch.stack(errors).max() / unit)  # NaN stays NaN, and fails the check


def _loader_error(entry_dtype: torch.dtype, cache_dtype: torch.dtype) -> float:
    """Twice the number of elements of a small entry that torch converts to other values."""
    from voco_kernels.kv.loaders import triton

    head_dim = 16
    quantized = entry_dtype in (torch.int8, torch.float8_e4m3fn)
    entry = (_wave(1, 2, head_dim) * (100 if quantized else 1)).to(entry_dtype)
    scales = torch.full((2,), 0.75, dtype=torch.float32)
    cache_of_layer = torch.zeros(2, head_dim, dtype=cache_dtype)
    triton.run(
        Move(
            to_cache=True,
            num_layers=1,
            num_kv_heads=1,
            head_dim=head_dim,
            entries=torch.tensor([[entry.data_ptr(), scales.data_ptr() if quantized else 0, 0, 1]]),
            tokens=torch.zeros(1, 2, dtype=torch.int64),
            bases=torch.tensor([[row.data_ptr() for row in cache_of_layer]]),
            head_stride=head_dim,
            most_tokens=1,
            entry_dtype=entry_dtype,
            cache_dtype=cache_dtype,
            device=torch.device("cpu"),
        )
    )
    expected = entry.float() * (0.75 if quantized else 1)
    return float((cache_of_layer != expected.to(cache_dtype)).sum()) * 2


def _wave(seed: int, *shape: int) -> Tensor:
    """float64 numbers in [-1, 1], without a random generator, which vmap would not allow."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * (0.7 + 0.1 * seed)).sin().view(shape)
