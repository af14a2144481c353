"""Launches of the Triton kernels that build a layout and its schedule from token ids."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from voco_kernels.layout.schedule import TILE_COLUMNS
from voco_kernels.layout.triton_kernels import PLANES, SUMMARIES, analyse_kernel, emit_kernel

_LONGEST_CHUNK = 2048  # the scans of longer ones don't fit the registers of one program
_CHUNK_OF_LONG_ROWS = 1024


def layout_from_token_ids(
    input_ids: Tensor,
    voco_token_id: int,
    image_token_id: int | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    isolated: bool,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement ``operator.layout_from_token_ids``; ``block``, a power of two, is a chunk's length."""
    batch, length = input_ids.shape
    if block is None:
        block = max(_CHUNK_OF_LONG_ROWS, triton.next_power_of_2(length))
        block = block if block <= _LONGEST_CHUNK else _CHUNK_OF_LONG_ROWS
    chunks = triton.cdiv(length, block)
    int32: dict[str, Any] = dict(dtype=torch.int32, device=input_ids.device)
    visible_from, visible_until, kept, readers = (
        torch.empty(batch, length, **int32) for _ in range(4)
    )
    stray = torch.empty(batch, length, dtype=torch.bool, device=input_ids.device)
    query_tiles, key_tiles = (torch.empty(batch * length, TILE_COLUMNS, **int32) for _ in range(2))
    counts = torch.empty(2, **int32)
    planes = torch.empty(batch, PLANES.value, chunks * block, **int32)
    summaries = torch.empty(batch, SUMMARIES.value, chunks, **int32)

    ids, mask, positions = (
        tensor if tensor is None else tensor.contiguous()
        for tensor in (input_ids, attention_mask, position_ids)
    )
    shared: dict[str, Any] = dict(
        BLOCK=block,
        WIDTH=triton.next_power_of_2(chunks),
        num_warps=num_warps(block),
        num_stages=1,
    )
    with torch.cuda.device(input_ids.device) if input_ids.is_cuda else nullcontext():
        for first, last in [(1, 3)] if chunks == 1 else [(1, 1), (2, 2), (3, 3)]:
            analyse_kernel[(batch * chunks,)](
                ids, mask, positions, planes, summaries,
                visible_from, visible_until, stray, kept,
                voco_token_id, image_token_id, length, chunks,
                ISOLATED=isolated, FIRST_STAGE=first, LAST_STAGE=last, **shared,
            )  # fmt: skip
        emit_kernel[(batch * chunks,)](
            planes, summaries, visible_from, visible_until,
            query_tiles, key_tiles, counts, readers,
            batch, length, chunks, **shared,
        )  # fmt: skip
    return visible_from, visible_until, query_tiles, key_tiles, counts, kept, readers, stray


def num_warps(block: int) -> int:
    """The warps per program: four tokens per thread, for loads and stores of 16 bytes."""
    return max(block // 128, 1)
