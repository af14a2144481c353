"""The Triton loader, for GPUs from sm_80 on."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from voco_kernels import interpreter
from voco_kernels.kv.move import Move, kernel_reasons

# Read on import, because that is when Triton decides whether to interpret kernels.
_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TILE = 2048  # elements that a program moves at a time: 16 per thread
_PROGRAMS = 8  # per multiprocessor
# With the number of registers given, ptxas doesn't spill in order to fit more programs.
OPTIONS = {"num_warps": 4, "maxnreg": 128}


def missing() -> list[str]:
    if not _INSTALLED:
        return ["triton is not installed; CUDA builds of torch bring it"]
    if not torch.cuda.is_available() and not _INTERPRETED:
        return [f"no CUDA device; {interpreter.HINT}"]
    return []


def unsupported(move: Move) -> list[str]:
    if move.device.type != "cuda" and not _INTERPRETED:
        return [f"expected a cache on CUDA, got {move.device}"]
    if move.device.type == "cuda" and torch.cuda.get_device_capability(move.device) < (8, 0):
        return [f"expected a device of compute capability 8.0 or later, got {move.device}"]
    reasons = kernel_reasons(move)
    if _INTERPRETED and not reasons:
        reasons += interpreter.loader_reasons(move)
    return reasons


def run(move: Move) -> None:
    import triton

    from voco_kernels.kv.loaders.triton_kernel import move_kernel

    values = constants(
        move.to_cache,
        move.is_copy,
        move.entry_dtype,
        move.cache_dtype,
        move.head_dim,
        0 if move.inv_freq is None else 2 * move.inv_freq.numel(),
        move.interleaved,
    )
    rows = 2 * move.num_layers * move.num_kv_heads * move.most_tokens
    room = _PROGRAMS * _multiprocessors(move.device) // move.num_entries
    programs = max(1, min(triton.cdiv(rows, values["ROWS"]), room)) * move.num_entries
    on_cuda = move.device.type == "cuda"
    with torch.cuda.device(move.device) if on_cuda else nullcontext():
        move_kernel[(programs + (move.lengths is not None),)](
            move.entries, move.tokens, move.bases, move.lengths, move.inv_freq,
            move.num_layers, move.num_kv_heads, move.head_stride, move.num_entries, move.length,
            **values, **OPTIONS,
        )  # fmt: skip


@lru_cache
def constants(
    to_cache: bool,
    is_copy: bool,
    entry_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    import triton.language as tl

    if is_copy:
        types = (tl.int32 if cache_dtype.itemsize == 4 else tl.int16,) * 2
    else:
        triton_types = {
            torch.bfloat16: tl.bfloat16,
            torch.float16: tl.float16,
            torch.float32: tl.float32,
            torch.int8: tl.int8,
            torch.float8_e4m3fn: tl.uint8,
        }
        types = triton_types[entry_dtype], triton_types[cache_dtype]
    rotary_block = _power_of_two(rotary_dim if interleaved else rotary_dim // 2)
    return {
        "TO_CACHE": to_cache,
        "ENTRY_TYPE": types[0],
        "CACHE_TYPE": types[1],
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "ROWS": max(TILE // _power_of_two(head_dim), 1),
        "ROTARY_BLOCK": rotary_block,
        "REST_BLOCK": _power_of_two(head_dim - rotary_dim),
    }


def _power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``, and at least 2."""
    return max(2, 1 << (size - 1).bit_length())


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
