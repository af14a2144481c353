"""The CUDA loader, for Hopper (sm_90a), from ``csrc/kv_load.cu``."""

from __future__ import annotations

from typing import Any

import torch

from voco_kernels import extension
from voco_kernels.kv.move import Move, kernel_reasons

# Tests replace the extension by one that runs on the CPU, an emulation of the chip.
_extension, _why_not = extension.load()
_emulated = False

# The names in ``Element`` (csrc/params.h).
_ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3",
}


def missing() -> list[str]:
    if _extension is None:
        return [_why_not]
    if not _emulated and not any(map(extension.is_hopper, range(torch.cuda.device_count()))):
        return ["no CUDA device of compute capability 9.0"]
    return []


def unsupported(move: Move) -> list[str]:
    if move.device.type != "cuda" and not _emulated:
        return [f"expected a cache on CUDA, got {move.device}"]
    if move.device.type == "cuda" and not extension.is_hopper(move.device):
        return [f"expected a device of compute capability 9.0, got {move.device}"]
    return kernel_reasons(move)


def run(move: Move) -> None:
    params = _extension.KvMoveParams()
    params.to_cache = move.to_cache
    params.num_entries = move.num_entries
    params.num_layers = move.num_layers
    params.num_kv_heads = move.num_kv_heads
    params.head_dim = move.head_dim
    params.most_tokens = move.most_tokens
    params.head_stride = move.head_stride
    params.entry_type = _element(move.entry_dtype)
    params.cache_type = _element(move.cache_dtype)
    params.entries = move.entries.data_ptr()
    params.tokens = move.tokens.data_ptr()
    params.bases = move.bases.data_ptr()
    if move.inv_freq is not None:
        params.inv_freq = move.inv_freq.data_ptr()
        params.rotary_dim = 2 * move.inv_freq.numel()
        params.interleaved = move.interleaved
    if move.lengths is not None:
        params.lengths = move.lengths.data_ptr()
        params.length = move.length
    stream = 0
    if move.device.type == "cuda":
        index = move.device.index
        params.device = torch.cuda.current_device() if index is None else index
        stream = torch.cuda.current_stream(move.device).cuda_stream
    _extension.kv_move(params, stream)


def _element(dtype: torch.dtype) -> Any:
    return getattr(_extension.Element, _ELEMENTS[dtype])
