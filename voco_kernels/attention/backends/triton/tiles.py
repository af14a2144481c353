"""Load functions and constants shared by the Triton attention kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from voco_kernels.layout import schedule

# Softmax is computed in base 2, where an exponential is one instruction.
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
INT32_MAX = tl.constexpr(2**31 - 1)

# Columns of the schedule's tables, described in voco_kernels/layout/schedule.py.
TILE_COLUMNS = tl.constexpr(schedule.TILE_COLUMNS)
ROW = tl.constexpr(schedule.ROW)
START = tl.constexpr(schedule.START)
STOP = tl.constexpr(schedule.STOP)
KEY_START = tl.constexpr(schedule.KEY_START)
PREFIX_START = tl.constexpr(schedule.PREFIX_START)
PREFIX_STOP = tl.constexpr(schedule.PREFIX_STOP)
KIND = tl.constexpr(schedule.KIND)
KEY_TILE_START = tl.constexpr(schedule.KEY_TILE_START)
KEY_TILE_STOP = tl.constexpr(schedule.KEY_TILE_STOP)
QUERY_START = tl.constexpr(schedule.QUERY_START)
QUERY_STOP = tl.constexpr(schedule.QUERY_STOP)
CONTIGUOUS = tl.constexpr(schedule.CONTIGUOUS)
# Elements of the schedule's counts.
QUERY_TILES = tl.constexpr(schedule.QUERY_TILES)
KEY_TILES = tl.constexpr(schedule.KEY_TILES)


@triton.jit
def load_rows(base, positions, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[len(positions), BLOCK_D]``: rows at these positions; 0 if not inside, and from HEAD_DIM on."""
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    # [len(positions), BLOCK_D]
    return tl.load(base + positions[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_block(
    descriptor, row, head, base, stride, start, stop,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """``[BLOCK, BLOCK_D]``: one head's rows from ``start`` on, loaded by TMA if there is a descriptor.

    With MASK, rows from ``stop`` on are 0. They may be padding, which can hold anything, and a
    probability of 0 times NaN is NaN.
    """
    local = tl.arange(0, BLOCK)
    if descriptor is not None:
        # [1, 1, BLOCK, BLOCK_D] -> [BLOCK, BLOCK_D]
        block = descriptor.load([row, head, start, 0]).reshape(BLOCK, BLOCK_D)
        if MASK:
            block = tl.where((start + local < stop)[:, None], block, 0.0)
    else:
        columns = tl.arange(0, BLOCK_D)
        pointers = base + tl.cast(start, tl.int64) * stride
        # [BLOCK, BLOCK_D]
        pointers = pointers + local[:, None] * stride + columns[None, :]
        if MASK:
            mask = (start + local < stop)[:, None]
            if HEAD_DIM != BLOCK_D:
                mask = mask & (columns < HEAD_DIM)[None, :]
            block = tl.load(pointers, mask=mask, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            block = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
def load_query_tile(query_tiles, tile, part, BLOCK_M: tl.constexpr):
    """Load part ``part`` of a tile: its row in the batch, its queries [start, stop), the first key of
    its contiguous range, and its prefix [start, stop) in ``kept``. Empty parts have start >= stop."""
    columns = query_tiles + tile * TILE_COLUMNS
    start = tl.load(columns + START) + part * BLOCK_M
    stop = tl.minimum(tl.load(columns + STOP), start + BLOCK_M)
    return (
        tl.load(columns + ROW), start, stop,
        tl.load(columns + KEY_START), tl.load(columns + PREFIX_START), tl.load(columns + PREFIX_STOP),
    )  # fmt: skip
