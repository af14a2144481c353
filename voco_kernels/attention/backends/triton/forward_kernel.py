"""The Triton forward kernel. A work item is one part of a query tile, for one head."""

from __future__ import annotations

import triton
import triton.language as tl

from voco_kernels.attention.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    QUERY_TILES,
    load_block,
    load_query_tile,
    load_rows,
)

# These kernels are short of registers, and hoisting addresses out of loops makes them spill. So every
# loop has disable_licm, and loops that gather rows, which are rare, are not pipelined.


@triton.jit
def _attend(
    acc, row_max, row_sum, q, query, first_query,
    k_desc, v_desc, row, head, k_base, v_base, stride_ks, stride_vs,
    kept, begin, end, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    GATHER: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end): positions or, with GATHER, indices into ``kept``.

    Without GATHER and PARTIAL, there must be whole blocks only. Only blocks on the diagonal, and the
    last block of a gathered range, apply a mask.
    """
    for start in tl.range(begin, end, BLOCK_N, disable_licm=True, num_stages=1 if GATHER else None):
        # [BLOCK_N]
        key = start + tl.arange(0, BLOCK_N)
        if GATHER:
            inside = key < end
            position = tl.load(kept + key, mask=inside, other=0).to(tl.int64)
            # [BLOCK_N, BLOCK_D]
            k = load_rows(k_base, position, stride_ks, inside, HEAD_DIM, BLOCK_D)
        else:
            # [BLOCK_N, BLOCK_D]
            k = load_block(
                k_desc, row, head, k_base, stride_ks, start, end,
                BLOCK_N, HEAD_DIM, BLOCK_D, MASK=False if k_desc is not None else PARTIAL,
            )  # fmt: skip
        # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if GATHER:
            if start + BLOCK_N > end:
                scores = tl.where(inside[None, :], scores, float("-inf"))
        else:
            if start + BLOCK_N - 1 > first_query:
                scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))

        # Base 2 with the scale folded in: one FMA and one exp2 per score.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if GATHER:
            # [BLOCK_N, BLOCK_D]
            v = load_rows(v_base, position, stride_vs, inside, HEAD_DIM, BLOCK_D)
        else:
            # [BLOCK_N, BLOCK_D]
            v = load_block(
                v_desc, row, head, v_base, stride_vs, start, end,
                BLOCK_N, HEAD_DIM, BLOCK_D, MASK=PARTIAL,
            )  # fmt: skip
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    Q, K, V, q_desc, k_desc, v_desc, Out, Lse,
    query_tiles, counts, kept_positions,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    scale, heads, group, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write all of Out ``[B, Hq, S, D]`` and Lse fp32 ``[B, Hq, S]``; padding gets 0 and -inf.

    ``q_desc``, ``k_desc`` and ``v_desc`` are TMA descriptors for blocks of Q, K and V, or None.
    The grid covers the usual number of items; if the schedule has more, programs take several.
    """
    PARTS: tl.constexpr = TILE // BLOCK_M
    scale_log2 = scale * LOG2_E
    items = tl.load(counts + QUERY_TILES) * heads * PARTS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        # Heads vary fastest, so K and V of a row stay in L2. Late parts come first: they take longest.
        head = item % heads
        part = item // heads
        row, start, stop, key_start, prefix_start, prefix_stop = load_query_tile(
            query_tiles, part // PARTS, PARTS - 1 - part % PARTS, BLOCK_M
        )
        local = tl.arange(0, BLOCK_M)
        query = start + local
        in_tile = query < stop
        wide_row, wide_start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
        wide_head, kv_head = tl.cast(head, tl.int64), head // group
        wide_kv_head = tl.cast(kv_head, tl.int64)
        # Rows after the tile's end need no mask: their results are not stored.
        q_base = Q + wide_row * stride_qb + wide_head * stride_qh
        # [BLOCK_M, BLOCK_D]
        q = load_block(
            q_desc, row, head, q_base, stride_qs, start, stop,
            BLOCK_M, HEAD_DIM, BLOCK_D, MASK=q_desc is None,
        )  # fmt: skip
        k_base = K + wide_row * stride_kb + wide_kv_head * stride_kh
        v_base = V + wide_row * stride_vb + wide_kv_head * stride_vh
        kept = kept_positions + wide_row * length

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        # Padding has key_start = stop. After ``whole`` there is at most one block, a partial one.
        whole = key_start + tl.maximum(stop - key_start, 0) // BLOCK_N * BLOCK_N
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, prefix_start, prefix_stop, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=True, PARTIAL=True,
        )  # fmt: skip
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, key_start, whole, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, PARTIAL=False,
        )  # fmt: skip
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, whole, stop, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, PARTIAL=True,
        )  # fmt: skip

        # Padding sees no key: its maximum is -inf, and its sum, 0, is replaced by 1.
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)
        lse = (row_max + tl.math.log2(row_sum)) * LN_2
        tl.store(Lse + (wide_row * heads + head) * length + query, lse, mask=in_tile)
        columns = tl.arange(0, BLOCK_D)
        o_base = Out + wide_row * stride_ob + wide_head * stride_oh + wide_start * stride_os
        tl.store(
            o_base + local[:, None] * stride_os + columns[None, :],
            (acc / row_sum[:, None]).to(Out.dtype.element_ty),
            mask=in_tile[:, None] & (columns < HEAD_DIM)[None, :],
        )
