"""The Triton backward kernels: dQ by query tile, dK and dV by key tile, deterministic (no atomics)."""

from __future__ import annotations

import triton
import triton.language as tl

from voco_kernels.attention.backends.triton.tiles import (
    CONTIGUOUS,
    INT32_MAX,
    KEY_TILE_START,
    KEY_TILE_STOP,
    KEY_TILES,
    KIND,
    LOG2_E,
    QUERY_START,
    QUERY_STOP,
    QUERY_TILES,
    ROW,
    TILE_COLUMNS,
    load_block,
    load_query_tile,
    load_rows,
)


@triton.jit
def delta_kernel(
    Out, DOut, DLse, Delta,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    heads, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Write Delta fp32 ``[B, Hq, S]`` = rowsum(Out * DOut) - DLse, so that dS = P * (dP - Delta)."""
    item = tl.program_id(0).to(tl.int64)
    row, head = item // heads, item % heads
    position = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = position < length
    wide = position.to(tl.int64)
    o_base = Out + row * stride_ob + head * stride_oh
    g_base = DOut + row * stride_gb + head * stride_gh
    # [BLOCK_M, BLOCK_D] each
    o = load_rows(o_base, wide, stride_os, inside, HEAD_DIM, BLOCK_D)
    do = load_rows(g_base, wide, stride_gs, inside, HEAD_DIM, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLse + item * length + position, mask=inside, other=0.0)
    tl.store(Delta + item * length + position, delta, mask=inside)


@triton.jit
def _accumulate_dq(
    dq, q, do, lse_log2, delta, query, first_query,
    k_desc, v_desc, row, head, k_base, v_base, stride_ks, stride_vs,
    kept, begin, end, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    GATHER: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add dQ / scale from keys [begin, end), given as in the forward kernel's ``_attend``."""
    for start in tl.range(begin, end, BLOCK_N, disable_licm=True, num_stages=1 if GATHER else None):
        # [BLOCK_N]
        key = start + tl.arange(0, BLOCK_N)
        if GATHER:
            inside = key < end
            position = tl.load(kept + key, mask=inside, other=0).to(tl.int64)
            # [BLOCK_N, BLOCK_D]
            k = load_rows(k_base, position, stride_ks, inside, HEAD_DIM, BLOCK_D)
            # [BLOCK_N, BLOCK_D]
            v = load_rows(v_base, position, stride_vs, inside, HEAD_DIM, BLOCK_D)
        else:
            # [BLOCK_N, BLOCK_D]
            k = load_block(
                k_desc, row, head, k_base, stride_ks, start, end,
                BLOCK_N, HEAD_DIM, BLOCK_D, MASK=PARTIAL,
            )  # fmt: skip
            # [BLOCK_N, BLOCK_D]
            v = load_block(
                v_desc, row, head, v_base, stride_vs, start, end,
                BLOCK_N, HEAD_DIM, BLOCK_D, MASK=PARTIAL,
            )  # fmt: skip
        # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - lse_log2[:, None])
        if GATHER:
            if start + BLOCK_N > end:
                p = tl.where(inside[None, :], p, 0.0)
        else:
            if start + BLOCK_N - 1 > first_query:
                p = tl.where(key[None, :] <= query[:, None], p, 0.0)
        # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    Q, K, V, k_desc, v_desc, DOut, Lse, Delta, DQ,
    query_tiles, counts, kept_positions,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs,
    stride_ob, stride_oh, stride_os,
    scale, heads, group, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write all of DQ ``[B, Hq, S, D]``; padding gets 0. Work items are those of the forward kernel."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    scale_log2 = scale * LOG2_E
    items = tl.load(counts + QUERY_TILES) * heads * PARTS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
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
        q_base = Q + wide_row * stride_qb + wide_head * stride_qh + wide_start * stride_qs
        g_base = DOut + wide_row * stride_gb + wide_head * stride_gh + wide_start * stride_gs
        # [BLOCK_M, BLOCK_D] each
        q = load_rows(q_base, local, stride_qs, in_tile, HEAD_DIM, BLOCK_D)
        do = load_rows(g_base, local, stride_gs, in_tile, HEAD_DIM, BLOCK_D)
        statistics = (wide_row * heads + head) * length + query
        # exp2(-inf) is 0: rows after the tile's end contribute nothing.
        # [BLOCK_M] each
        lse = tl.load(Lse + statistics, mask=in_tile, other=float("inf"))
        lse_log2 = lse * LOG2_E
        delta = tl.load(Delta + statistics, mask=in_tile, other=0.0)
        k_base = K + wide_row * stride_kb + wide_kv_head * stride_kh
        v_base = V + wide_row * stride_vb + wide_kv_head * stride_vh
        kept = kept_positions + wide_row * length

        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        whole = key_start + tl.maximum(stop - key_start, 0) // BLOCK_N * BLOCK_N
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, prefix_start, prefix_stop, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=True, PARTIAL=True,
        )  # fmt: skip
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, key_start, whole, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, PARTIAL=False,
        )  # fmt: skip
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, query, start,
            k_desc, v_desc, row, kv_head, k_base, v_base, stride_ks, stride_vs,
            kept, whole, stop, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, PARTIAL=True,
        )  # fmt: skip
        columns = tl.arange(0, BLOCK_D)
        o_base = DQ + wide_row * stride_ob + wide_head * stride_oh + wide_start * stride_os
        tl.store(
            o_base + local[:, None] * stride_os + columns[None, :],
            (dq * scale).to(DQ.dtype.element_ty),
            mask=in_tile[:, None] & (columns < HEAD_DIM)[None, :],
        )


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, key, first_key, last_key,
    q_desc, g_desc, row, head, q_base, g_base, lse_base, delta_base, stride_qs, stride_gs,
    readers, visible_from, begin, end, diagonal_stop, scale_log2,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add dK / scale and dV from queries [begin, end): positions or, with GATHER, indices into
    ``readers``.

    Positions take two calls: with MASK, for the blocks before ``diagonal_stop`` and the last block if it
    is partial; without MASK, for the whole blocks between them. With GATHER, one call takes all blocks.
    Scores are transposed, [BLOCK_N, BLOCK_M], so that P and dS stay in registers as left operands.
    """
    blocks = tl.cdiv(end - begin, BLOCK_M)
    diagonal = blocks
    if not GATHER:
        whole = (end - diagonal_stop) // BLOCK_M
        diagonal = tl.cdiv(diagonal_stop - begin, BLOCK_M)
        blocks = whole
        if MASK:
            blocks = diagonal + (diagonal_stop + whole * BLOCK_M < end).to(tl.int32)
    for index in tl.range(0, blocks, disable_licm=True, num_stages=1 if GATHER else None):
        start = begin + index * BLOCK_M
        if not GATHER:
            if MASK:
                start = tl.where(index < diagonal, start, diagonal_stop + whole * BLOCK_M)
            else:
                start = diagonal_stop + index * BLOCK_M
        # [BLOCK_M]
        query = start + tl.arange(0, BLOCK_M)
        inside = query < end
        if GATHER:
            query = tl.load(readers + query, mask=inside, other=0)
            position = query.to(tl.int64)
            # [BLOCK_M, BLOCK_D] each
            q = load_rows(q_base, position, stride_qs, inside, HEAD_DIM, BLOCK_D)
            do = load_rows(g_base, position, stride_gs, inside, HEAD_DIM, BLOCK_D)
        else:
            # [BLOCK_M, BLOCK_D] each
            q = load_block(
                q_desc, row, head, q_base, stride_qs, start, end,
                BLOCK_M, HEAD_DIM, BLOCK_D, MASK,
            )  # fmt: skip
            do = load_block(
                g_desc, row, head, g_base, stride_gs, start, end,
                BLOCK_M, HEAD_DIM, BLOCK_D, MASK,
            )  # fmt: skip
        if GATHER or MASK:
            # exp2(-inf) is 0: queries after the end contribute nothing.
            # [BLOCK_M] each
            lse = tl.load(lse_base + query, mask=inside, other=float("inf"))
            delta = tl.load(delta_base + query, mask=inside, other=0.0)
        else:
            # [BLOCK_M] each
            lse = tl.load(lse_base + query)
            delta = tl.load(delta_base + query)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - lse[None, :] * LOG2_E)
        if GATHER:
            # [BLOCK_M]
            since = tl.load(visible_from + query, mask=inside, other=0)
            first_query = tl.min(tl.where(inside, query, INT32_MAX), 0)
            if (first_query < last_key) | (tl.max(since, 0) > first_key):
                seen = (since[None, :] <= key[:, None]) & (key[:, None] <= query[None, :])
                p = tl.where(seen, p, 0.0)
        elif MASK:
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_N, BLOCK_D]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_N, BLOCK_D]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, q_desc, g_desc, DOut, Lse, Delta, DK, DV,
    key_tiles, counts, kept_positions, reader_positions, visible_from,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs,
    stride_xb, stride_xh, stride_xs,
    stride_yb, stride_yh, stride_ys,
    scale, kv_heads, group, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write all of DK and DV ``[B, Hkv, S, D]``; padding gets 0.

    A work item is one part of a key tile, for one KV head, and sums over the query heads of its group.
    ``q_desc`` and ``g_desc`` are TMA descriptors for blocks [1, 1, BLOCK_M, BLOCK_D] of Q and DOut, or
    None.
    """
    PARTS: tl.constexpr = TILE // BLOCK_N
    scale_log2 = scale * LOG2_E
    items = tl.load(counts + KEY_TILES) * kv_heads * PARTS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        kv_head = item % kv_heads
        part = item // kv_heads
        tile = key_tiles + part // PARTS * TILE_COLUMNS
        offset = part % PARTS * BLOCK_N
        row = tl.load(tile + ROW)
        gathered = tl.load(tile + KIND) != CONTIGUOUS
        start = tl.load(tile + KEY_TILE_START) + offset
        stop = tl.load(tile + KEY_TILE_STOP)
        query_start = tl.load(tile + QUERY_START)
        query_stop = tl.load(tile + QUERY_STOP)

        rank = start + tl.arange(0, BLOCK_N)
        in_tile = rank < stop
        wide_row, wide_kv_head = tl.cast(row, tl.int64), tl.cast(kv_head, tl.int64)
        kept = kept_positions + wide_row * length
        # Compares with a scalar because newer interpreters reject "block & scalar" as a mask.
        kept_stop = tl.where(gathered, stop, 0)
        # [BLOCK_N]
        key = tl.where(gathered, tl.load(kept + rank, mask=rank < kept_stop, other=0), rank)
        position = key.to(tl.int64)
        k_base = K + wide_row * stride_kb + wide_kv_head * stride_kh
        v_base = V + wide_row * stride_vb + wide_kv_head * stride_vh
        # [BLOCK_N, BLOCK_D] each
        k = load_rows(k_base, position, stride_ks, in_tile, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base, position, stride_vs, in_tile, HEAD_DIM, BLOCK_D)
        first_key = tl.min(tl.where(in_tile, key, INT32_MAX), 0)
        last_key = tl.max(tl.where(in_tile, key, -1), 0)

        # A tile is either gathered or contiguous; the other kind's range of queries is empty.
        empty = start >= stop
        readers_stop = tl.where(gathered & (not empty), query_stop, query_start)
        contiguous_start = query_start + offset
        contiguous_stop = tl.where(gathered | empty, contiguous_start, query_stop)
        diagonal_stop = tl.minimum(contiguous_start + BLOCK_N, contiguous_stop)

        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for member in tl.range(0, group, disable_licm=True):
            head = kv_head * group + member
            wide_head = tl.cast(head, tl.int64)
            q_base = Q + wide_row * stride_qb + wide_head * stride_qh
            g_base = DOut + wide_row * stride_gb + wide_head * stride_gh
            statistics = (wide_row * kv_heads * group + head) * length
            lse_base, delta_base = Lse + statistics, Delta + statistics
            readers = reader_positions + wide_row * length
            since = visible_from + wide_row * length
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, key, first_key, last_key,
                q_desc, g_desc, row, head, q_base, g_base, lse_base, delta_base, stride_qs, stride_gs,
                readers, since, query_start, readers_stop, 0, scale_log2,
                BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION, GATHER=True, MASK=True,
            )  # fmt: skip
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, key, first_key, last_key,
                q_desc, g_desc, row, head, q_base, g_base, lse_base, delta_base, stride_qs, stride_gs,
                readers, since, contiguous_start, contiguous_stop, diagonal_stop, scale_log2,
                BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, MASK=True,
            )  # fmt: skip
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, key, first_key, last_key,
                q_desc, g_desc, row, head, q_base, g_base, lse_base, delta_base, stride_qs, stride_gs,
                readers, since, contiguous_start, contiguous_stop, diagonal_stop, scale_log2,
                BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION, GATHER=False, MASK=False,
            )  # fmt: skip

        columns = tl.arange(0, BLOCK_D)
        inside = in_tile[:, None] & (columns < HEAD_DIM)[None, :]
        x_base = DK + wide_row * stride_xb + wide_kv_head * stride_xh
        y_base = DV + wide_row * stride_yb + wide_kv_head * stride_yh
        tl.store(
            x_base + position[:, None] * stride_xs + columns[None, :],
            (dk * scale).to(DK.dtype.element_ty),
            mask=inside,
        )
        tl.store(
            y_base + position[:, None] * stride_ys + columns[None, :],
            dv.to(DV.dtype.element_ty),
            mask=inside,
        )
