"""Triton kernels that build a layout and its schedule from token ids.

There are two launches for rows of up to 2048 tokens, else four. The torch code in ``token_ids.py`` and
``schedule.py`` is the specification, and the results are equal. Each row is cut into chunks, one program
each, and the work into four stages. An earlier stage writes a few ints for each chunk, its *summaries*;
a scan along a row then starts in each chunk from the summaries of the chunks before it (or after it,
for a reverse scan). So no program waits for another, and each stage is one pass over the tokens. If a
row is a single chunk, the first three stages share a launch.

    mark   what each token is: real, VoCo, a document's first, ...
    see    documents and segments: visible_from, visible_until, hidden and kept keys
    cut    runs, indices in ``kept``, and where tiles start
    emit   indices in ``readers``, and the tiles, at their places in the tables of the whole batch

Shapes: values computed for tokens are ``[BLOCK]``, a chunk's tokens; values loaded from summaries are
``[WIDTH]``, a row's chunks; everything else is a scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl

from voco_kernels.layout import schedule

_TILE = tl.constexpr(schedule.TILE)
_CONTIGUOUS, _GATHERED = tl.constexpr(schedule.CONTIGUOUS), tl.constexpr(schedule.GATHERED)
# Columns of the tile tables, and elements of counts.
_TILE_COLUMNS = tl.constexpr(schedule.TILE_COLUMNS)
_ROW = tl.constexpr(schedule.ROW)
_START, _STOP = tl.constexpr(schedule.START), tl.constexpr(schedule.STOP)
_KEY_START = tl.constexpr(schedule.KEY_START)
_PREFIX_START = tl.constexpr(schedule.PREFIX_START)
_PREFIX_STOP = tl.constexpr(schedule.PREFIX_STOP)
_TILE_RUN_START = tl.constexpr(schedule.RUN_START)
_TILE_RUN_STOP = tl.constexpr(schedule.RUN_STOP)
_KIND = tl.constexpr(schedule.KIND)
_KEY_TILE_START = tl.constexpr(schedule.KEY_TILE_START)
_KEY_TILE_STOP = tl.constexpr(schedule.KEY_TILE_STOP)
_QUERY_START = tl.constexpr(schedule.QUERY_START)
_QUERY_STOP = tl.constexpr(schedule.QUERY_STOP)
_QUERY_TILES, _KEY_TILES = tl.constexpr(schedule.QUERY_TILES), tl.constexpr(schedule.KEY_TILES)
_NOWHERE = tl.constexpr(2**30)  # a position that means "none"; no row is as long

# Bits in the planes MARKS, SIGHT and CUTS.
_REAL = tl.constexpr(1)
_STARTS_DOCUMENT = tl.constexpr(2)
_ENDS_DOCUMENT = tl.constexpr(4)
_IS_VOCO = tl.constexpr(8)
_ENDS_RUN_OF_VOCO = tl.constexpr(16)
_STARTS_PADDING = tl.constexpr(32)
_RESETS = tl.constexpr(64)  # no later segment includes tokens before this one
_OPENS = tl.constexpr(128)  # starts a segment if none is open
_KEPT = tl.constexpr(256)
_HIDDEN = tl.constexpr(512)
_STARTS_RUN = tl.constexpr(1024)
_RUN_STARTS_BEHIND = tl.constexpr(2048)  # the next token starts one
_CHANGES_VIEW = tl.constexpr(4096)  # visible_from differs from that of the token before
_VIEW_CHANGES_BEHIND = tl.constexpr(8192)
_READS_KEPT = tl.constexpr(16384)
_STARTS_QUERY_TILE = tl.constexpr(32768)
_STARTS_KEY_TILE = tl.constexpr(65536)
_IS_GATHERED = tl.constexpr(131072)

# Planes: one int32 per token, [B, planes, chunks * BLOCK].
_MARKS, _SIGHT, _CUTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SEGMENT_START = tl.constexpr(3)
_KEPT_BEFORE = tl.constexpr(4)
_LAST_HIDDEN = tl.constexpr(5)
_RUN_START, _RUN_STOP = tl.constexpr(6), tl.constexpr(7)
_GROUP_STOP = tl.constexpr(8)
PLANES = tl.constexpr(9)

# Summaries: one int32 per chunk, [B, summaries, chunks].
_LAST_DOCUMENT_START = tl.constexpr(0)
_FIRST_DOCUMENT_END = tl.constexpr(1)
_FIRST_VOCO_RUN_END = tl.constexpr(2)
_OPENING = tl.constexpr(3)
_NUM_KEPT = tl.constexpr(4)
_NUM_KEPT_AT_DOCUMENT_START = tl.constexpr(5)
_FIRST_KEPT = tl.constexpr(6)
_LAST_HIDDEN_IN_CHUNK = tl.constexpr(7)
_FIRST_RUN_START, _LAST_RUN_START = tl.constexpr(8), tl.constexpr(9)
_FIRST_BREAK = tl.constexpr(10)
_NUM_READERS = tl.constexpr(11)
_NUM_READERS_AT_DOCUMENT_END = tl.constexpr(12)
_NUM_QUERY_TILES, _NUM_KEY_TILES = tl.constexpr(13), tl.constexpr(14)
SUMMARIES = tl.constexpr(15)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit
def _running_max(values, before):
    """At each token, the maximum up to it; ``before`` is the maximum over earlier chunks."""
    return tl.maximum(tl.associative_scan(values, 0, _max), before)


@triton.jit
def _coming_min(values, behind):
    """At each token, the minimum from it on; ``behind`` is the minimum over later chunks."""
    return tl.minimum(tl.associative_scan(values, 0, _min, reverse=True), behind)


@triton.jit
def _continue_opening(a, b):
    """Combine the openings of two adjacent ranges of tokens into that of both.

    A range's opening is ``2 * (position + 1)`` of the first token since the last reset that opens a
    segment, or 0 if there is none; plus 1 if there is a reset in the range.
    """
    return tl.where((b & 1) != 0, b, tl.where(a > 1, a, a | b))


@triton.jit
def _has(marks, BIT: tl.constexpr):
    return (marks & BIT) != 0


@triton.jit
def _at(flag, position):
    return tl.where(flag, position, -1)


@triton.jit
def _at_or_nowhere(flag, position):
    return tl.where(flag, position, _NOWHERE)


@triton.jit
def _count(flag):
    return tl.sum(flag.to(tl.int32), 0)


@triton.jit
def _of_chunks(
    summaries, FIELD: tl.constexpr, first, last, chunks, NEUTRAL: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """``[WIDTH]``: a summary of this row's chunks [first, last); NEUTRAL for other chunks."""
    chunk = tl.arange(0, WIDTH)
    mask = (chunk >= first) & (chunk < last)
    return tl.load(summaries + FIELD * chunks + chunk, mask=mask, other=NEUTRAL)


@triton.jit
def _token(
    ids, attention_mask, position_ids, position, length, voco_token_id
):  # fmt: skip
    """Whether each of these positions holds a real token, a VoCo token, and a token that starts a
    document by its position id or document number."""
    inside = (position >= 0) & (position < length)
    real = inside
    first = inside & (position < 0)
    if attention_mask is not None:
        own = tl.load(attention_mask + position, mask=inside, other=0)
        before = tl.load(attention_mask + position - 1, mask=inside & (position > 0), other=0)
        real = inside & (own != 0)
        first = real & (own != before)
    voco = real & (tl.load(ids + position, mask=inside, other=0) == voco_token_id)
    if position_ids is not None:
        own = tl.load(position_ids + position, mask=inside, other=0)
        before = tl.load(position_ids + position - 1, mask=inside & (position > 0), other=-1)
        first = first | (real & (own != before + 1))
    return real, voco, first


@triton.jit
def _mark(
    ids, attention_mask, position_ids, planes, summaries, voco_token_id, image_token_id,
    chunk, length, chunks, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    real_before, voco_before, _ = _token(
        ids, attention_mask, position_ids, position - 1, length, voco_token_id
    )
    real, voco, first = _token(ids, attention_mask, position_ids, position, length, voco_token_id)
    real_behind, voco_behind, first_behind = _token(
        ids, attention_mask, position_ids, position + 1, length, voco_token_id
    )
    starts_document = real & (~real_before | first)
    ends_document = real & (~real_behind | first_behind)
    ends_run = voco & (~voco_behind | ends_document)
    starts_padding = (position < length) & ~real & (real_before | (position == 0))
    resets = real & (starts_document | (voco_before & ~voco))
    opens = real & ~voco
    if image_token_id is not None:
        is_image = tl.load(ids + position, mask=real, other=0) == image_token_id
        opens = opens & (starts_document | is_image)

    marks = tl.where(real, _REAL, 0) | tl.where(voco, _IS_VOCO, 0)
    marks |= tl.where(starts_document, _STARTS_DOCUMENT, 0)
    marks |= tl.where(ends_document, _ENDS_DOCUMENT, 0)
    marks |= tl.where(ends_run, _ENDS_RUN_OF_VOCO, 0)
    marks |= tl.where(starts_padding, _STARTS_PADDING, 0)
    marks |= tl.where(resets, _RESETS, 0) | tl.where(opens, _OPENS, 0)
    tl.store(planes + _MARKS * chunks * BLOCK + position, marks)

    if WIDTH > 1:
        summary = summaries + chunk
        last_start = tl.max(_at(starts_document, position), 0)
        tl.store(summary + _LAST_DOCUMENT_START * chunks, last_start)
        first_end = tl.min(_at_or_nowhere(ends_document, position), 0)
        tl.store(summary + _FIRST_DOCUMENT_END * chunks, first_end)
        first_end = tl.min(_at_or_nowhere(ends_run, position), 0)
        tl.store(summary + _FIRST_VOCO_RUN_END * chunks, first_end)
        last_reset = tl.max(_at(resets, position), 0)
        opening = tl.min(_at_or_nowhere(opens & (position >= last_reset), position), 0)
        opening = tl.where(opening == _NOWHERE, 0, (opening + 1) * 2)
        tl.store(summary + _OPENING * chunks, opening | tl.where(last_reset >= 0, 1, 0))


@triton.jit
def _see(
    planes, summaries, visible_from, visible_until, stray,
    chunk, length, chunks, ISOLATED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    marks = tl.load(planes + _MARKS * chunks * BLOCK + position)
    real, voco = _has(marks, _REAL), _has(marks, _IS_VOCO)
    starts_document = _has(marks, _STARTS_DOCUMENT)
    ends_document = _has(marks, _ENDS_DOCUMENT)
    ends_run = _has(marks, _ENDS_RUN_OF_VOCO)

    before = tl.max(_of_chunks(summaries, _LAST_DOCUMENT_START, 0, chunk, chunks, -1, WIDTH), 0)
    document_start = _running_max(_at(starts_document, position), before)
    behind = _of_chunks(
        summaries, _FIRST_DOCUMENT_END, chunk + 1, chunks, chunks, _NOWHERE, WIDTH
    )  # fmt: skip
    document_stop = _coming_min(_at_or_nowhere(ends_document, position), tl.min(behind, 0)) + 1
    behind = _of_chunks(
        summaries, _FIRST_VOCO_RUN_END, chunk + 1, chunks, chunks, _NOWHERE, WIDTH
    )  # fmt: skip
    segment_stop = _coming_min(_at_or_nowhere(ends_run, position), tl.min(behind, 0)) + 1

    # The opening of all chunks before: the first nonzero one from the last chunk with a reset on.
    openings = _of_chunks(summaries, _OPENING, 0, chunk, chunks, 0, WIDTH)
    index = tl.arange(0, WIDTH)
    reset = tl.max(_at((openings & 1) != 0, index), 0)
    opened = (index >= reset) & (openings > 1)
    before = tl.min(_at_or_nowhere(opened, openings), 0)
    before = tl.where(before == _NOWHERE, 0, before)
    opening = tl.where(_has(marks, _RESETS), 1, 0)
    opening |= tl.where(_has(marks, _OPENS), (position + 1) * 2, 0)
    opening = tl.associative_scan(opening, 0, _continue_opening)
    opening = _continue_opening(before, opening)
    segment_start = opening // 2 - 1  # -1: nothing is open

    context = real & ~voco & (segment_start >= 0) & (segment_stop <= document_stop)
    in_segment = voco & (segment_start >= 0)
    seen_until = tl.where(context, segment_stop, document_stop)
    seen_from = document_start
    if ISOLATED:
        seen_from = tl.where(context | in_segment, segment_start, document_start)
    tl.store(visible_from + position, tl.where(real, seen_from, length), mask=inside)
    tl.store(visible_until + position, tl.where(real, seen_until, 0), mask=inside)
    tl.store(stray + position, voco & ~in_segment, mask=inside)

    hidden = context & (segment_stop < document_stop)
    kept = real & ~hidden
    changes_view = starts_document | _has(marks, _STARTS_PADDING)
    run_starts_behind = in_segment & ends_run & ~ends_document
    view_changes_behind = run_starts_behind & ISOLATED & (segment_start != document_start)
    if ISOLATED:
        changes_view = changes_view | (context & (segment_start == position))
    sight = marks & (_REAL | _STARTS_DOCUMENT | _ENDS_DOCUMENT)
    sight |= tl.where(kept, _KEPT, 0) | tl.where(hidden, _HIDDEN, 0)
    sight |= tl.where(changes_view, _CHANGES_VIEW | _STARTS_RUN, 0)
    sight |= tl.where(run_starts_behind, _RUN_STARTS_BEHIND, 0)
    sight |= tl.where(view_changes_behind, _VIEW_CHANGES_BEHIND, 0)
    tl.store(planes + _SIGHT * chunks * BLOCK + position, sight)
    tl.store(planes + _SEGMENT_START * chunks * BLOCK + position, segment_start)

    # The stage cut needs this summary even if the row is a single chunk.
    tl.store(summaries + _NUM_KEPT * chunks + chunk, _count(kept))
    if WIDTH > 1:
        summary = summaries + chunk
        last_start = tl.max(_at(starts_document, position), 0)
        at_start = _count(kept & (position < last_start))
        tl.store(summary + _NUM_KEPT_AT_DOCUMENT_START * chunks, at_start)
        first_kept = tl.min(_at_or_nowhere(kept, position), 0)
        tl.store(summary + _FIRST_KEPT * chunks, first_kept)
        last_hidden = tl.max(_at(hidden, position), 0)
        tl.store(summary + _LAST_HIDDEN_IN_CHUNK * chunks, last_hidden)
        # A run that starts right after the chunk counts as this chunk's: the next chunk can't see it.
        first = tl.where(run_starts_behind, position + 1, _NOWHERE)
        first = tl.min(tl.where(changes_view, position, first), 0)
        tl.store(summary + _FIRST_RUN_START * chunks, first)
        last = tl.where(run_starts_behind, position + 1, _at(changes_view, position))
        tl.store(summary + _LAST_RUN_START * chunks, tl.max(last, 0))
        first = tl.where(view_changes_behind, position + 1, _NOWHERE)
        first = tl.min(tl.where(changes_view | hidden, position, first), 0)
        tl.store(summary + _FIRST_BREAK * chunks, first)


@triton.jit
def _cut(
    planes, summaries, visible_until, kept_positions,
    chunk, length, chunks, ISOLATED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    sights = planes + _SIGHT * chunks * BLOCK + position
    sight = tl.load(sights)
    sight_before = tl.load(sights - 1, mask=position > 0, other=0)
    sight_behind = tl.load(sights + 1, mask=position + 1 < chunks * BLOCK, other=0)
    real, kept, hidden = _has(sight, _REAL), _has(sight, _KEPT), _has(sight, _HIDDEN)

    starts_run = _has(sight, _STARTS_RUN) | _has(sight_before, _RUN_STARTS_BEHIND)
    before = tl.max(_of_chunks(summaries, _LAST_RUN_START, 0, chunk, chunks, -1, WIDTH), 0)
    run_start = _running_max(_at(starts_run, position), before)
    run_starts = _has(sight_behind, _STARTS_RUN) | _has(sight, _RUN_STARTS_BEHIND)
    behind = _of_chunks(summaries, _FIRST_RUN_START, chunk + 1, chunks, chunks, _NOWHERE, WIDTH)
    run_stop = _coming_min(_at_or_nowhere(run_starts, position + 1), tl.min(behind, 0))
    run_stop = tl.minimum(run_stop, length)

    num_kept = _of_chunks(summaries, _NUM_KEPT, 0, chunks, chunks, 0, WIDTH)
    index = tl.arange(0, WIDTH)
    kept_here = kept.to(tl.int32)
    kept_before = tl.cumsum(kept_here, 0) - kept_here + tl.sum(tl.where(index < chunk, num_kept, 0))
    starts = _of_chunks(summaries, _LAST_DOCUMENT_START, 0, chunk, chunks, -1, WIDTH)
    start_chunk = tl.max(_at(starts >= 0, index), 0)
    at_start = _of_chunks(
        summaries, _NUM_KEPT_AT_DOCUMENT_START, 0, chunk, chunks, 0, WIDTH
    )  # fmt: skip
    before = tl.where(index == start_chunk, at_start, tl.where(index < start_chunk, num_kept, 0))
    kept_at_start = _at(_has(sight, _STARTS_DOCUMENT), kept_before)
    kept_at_start = _running_max(kept_at_start, tl.sum(before, 0))

    before = tl.max(_of_chunks(summaries, _LAST_HIDDEN_IN_CHUNK, 0, chunk, chunks, -1, WIDTH), 0)
    last_hidden = _running_max(_at(hidden, position), before)
    behind = _of_chunks(summaries, _FIRST_KEPT, chunk + 1, chunks, chunks, _NOWHERE, WIDTH)
    next_kept = _coming_min(_at_or_nowhere(kept, position), tl.min(behind, 0))
    breaks = _has(sight_behind, _HIDDEN | _CHANGES_VIEW) | _has(sight, _VIEW_CHANGES_BEHIND)
    behind = _of_chunks(summaries, _FIRST_BREAK, chunk + 1, chunks, chunks, _NOWHERE, WIDTH)
    next_break = _coming_min(_at_or_nowhere(breaks, position + 1), tl.min(behind, 0))

    # Only if a hidden key or a change of view follows in the document does a key need gathering.
    document_stop = tl.load(visible_until + position, mask=inside & kept, other=0)
    gathered = kept & (next_break < document_stop)
    reads_kept = kept
    if not ISOLATED:
        reads_kept = real & (kept | (kept_before > kept_at_start))
    # A segment's whole context is one group of keys, and so are adjacent padding tokens.
    segment_start = tl.load(planes + _SEGMENT_START * chunks * BLOCK + position)
    in_group = position - tl.where(hidden, segment_start, run_start)
    in_group = tl.where(kept, kept_before - kept_at_start, in_group)
    starts_query_tile = inside & ((position - run_start) % _TILE == 0)
    starts_key_tile = inside & (in_group % _TILE == 0)

    cuts = sight & (_REAL | _ENDS_DOCUMENT)
    cuts |= tl.where(gathered, _IS_GATHERED, 0) | tl.where(reads_kept, _READS_KEPT, 0)
    cuts |= tl.where(starts_query_tile, _STARTS_QUERY_TILE, 0)
    cuts |= tl.where(starts_key_tile, _STARTS_KEY_TILE, 0)
    width = chunks * BLOCK
    tl.store(planes + _CUTS * width + position, cuts)
    tl.store(planes + _KEPT_BEFORE * width + position, kept_before)
    tl.store(planes + _LAST_HIDDEN * width + position, last_hidden)
    tl.store(planes + _RUN_START * width + position, run_start)
    tl.store(planes + _RUN_STOP * width + position, run_stop)
    group_stop = tl.where(kept, document_stop, tl.where(hidden, next_kept, run_stop))
    tl.store(planes + _GROUP_STOP * width + position, group_stop)

    # The tokens that aren't kept write the zeros after the last kept position.
    slot = tl.where(kept, kept_before, tl.sum(num_kept, 0) + position - kept_before)
    tl.store(kept_positions + slot, tl.where(kept, position, 0), mask=inside)

    summary = summaries + chunk
    tl.store(summary + _NUM_READERS * chunks, _count(reads_kept))
    tl.store(summary + _NUM_QUERY_TILES * chunks, _count(starts_query_tile))
    tl.store(summary + _NUM_KEY_TILES * chunks, _count(starts_key_tile))
    if WIDTH > 1:
        first_end = tl.min(_at_or_nowhere(_has(sight, _ENDS_DOCUMENT), position), 0)
        at_end = _count(reads_kept & (position <= first_end))
        tl.store(summary + _NUM_READERS_AT_DOCUMENT_END * chunks, at_end)


@triton.jit(do_not_specialize=["voco_token_id", "image_token_id", "length", "chunks"])
def analyse_kernel(
    ids, attention_mask, position_ids, planes, summaries,
    visible_from, visible_until, stray, kept,
    voco_token_id, image_token_id, length, chunks,
    ISOLATED: tl.constexpr, FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run stages FIRST_STAGE to LAST_STAGE of mark, see and cut (1 to 3) on a chunk.

    All tensors except ``planes`` and ``summaries`` are contiguous ``[B, S]``. ``attention_mask``,
    ``position_ids`` and ``image_token_id`` can be None. ``WIDTH`` is ``chunks`` rounded up to a power
    of two.
    """
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    offset = tl.cast(row, tl.int64) * length
    planes += tl.cast(row, tl.int64) * (PLANES * chunks * BLOCK)
    summaries += tl.cast(row, tl.int64) * (SUMMARIES * chunks)
    visible_from += offset
    visible_until += offset
    if FIRST_STAGE == 1:
        mask = attention_mask if attention_mask is None else attention_mask + offset
        positions = position_ids if position_ids is None else position_ids + offset
        _mark(
            ids + offset, mask, positions, planes, summaries, voco_token_id, image_token_id,
            chunk, length, chunks, BLOCK, WIDTH,
        )  # fmt: skip
    # Each stage reads what other threads wrote in the previous one.
    if FIRST_STAGE < 2 and LAST_STAGE >= 2:
        tl.debug_barrier()
    if FIRST_STAGE <= 2 and LAST_STAGE >= 2:
        _see(
            planes, summaries, visible_from, visible_until, stray + offset,
            chunk, length, chunks, ISOLATED, BLOCK, WIDTH,
        )  # fmt: skip
    if FIRST_STAGE < 3 and LAST_STAGE >= 3:
        tl.debug_barrier()
    if LAST_STAGE >= 3:
        _cut(
            planes, summaries, visible_until, kept + offset,
            chunk, length, chunks, ISOLATED, BLOCK, WIDTH,
        )  # fmt: skip


@triton.jit
def _sum_of_batch(summaries, FIELD: tl.constexpr, start, chunks, programs, program):
    """Two sums of a summary over the batch's 1024 chunks from ``start`` on: over those before this
    program's chunk, and over all."""
    index = start + tl.arange(0, 1024)
    address = (index // chunks * SUMMARIES + FIELD) * chunks + index % chunks
    values = tl.load(summaries + address, mask=index < programs, other=0)
    return tl.sum(tl.where(index < program, values, 0), 0), tl.sum(values, 0)


@triton.jit
def _store_query_tile(
    table, slot, mask, row, start, stop, key_start, prefix_start, prefix_stop, run_start, run_stop
):  # fmt: skip
    columns = table + tl.cast(slot, tl.int64) * _TILE_COLUMNS
    tl.store(columns + _ROW, row, mask=mask)
    tl.store(columns + _START, start, mask=mask)
    tl.store(columns + _STOP, stop, mask=mask)
    tl.store(columns + _KEY_START, key_start, mask=mask)
    tl.store(columns + _PREFIX_START, prefix_start, mask=mask)
    tl.store(columns + _PREFIX_STOP, prefix_stop, mask=mask)
    tl.store(columns + _TILE_RUN_START, run_start, mask=mask)
    tl.store(columns + _TILE_RUN_STOP, run_stop, mask=mask)


@triton.jit
def _store_key_tile(
    table, slot, mask, row, kind, start, stop, query_start, query_stop
):  # fmt: skip
    columns = table + tl.cast(slot, tl.int64) * _TILE_COLUMNS
    tl.store(columns + _ROW, row, mask=mask)
    tl.store(columns + _KIND, kind, mask=mask)
    tl.store(columns + _KEY_TILE_START, start, mask=mask)
    tl.store(columns + _KEY_TILE_STOP, stop, mask=mask)
    tl.store(columns + _QUERY_START, query_start, mask=mask)
    tl.store(columns + _QUERY_STOP, query_stop, mask=mask)
    for unused in tl.static_range(_QUERY_STOP + 1, _TILE_COLUMNS):
        tl.store(columns + unused, 0, mask=mask)


@triton.jit(do_not_specialize=["batch", "length", "chunks"])
def emit_kernel(
    planes, summaries, visible_from, visible_until,
    query_tiles, key_tiles, counts, reader_positions,
    batch, length, chunks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run the stage emit: write ``readers``, both tile tables, and ``counts``."""
    program = tl.program_id(0)
    query_tiles_before, num_query_tiles, key_tiles_before, num_key_tiles = 0, 0, 0, 0
    for start in tl.range(0, batch * chunks, 1024, disable_licm=True):
        before, total = _sum_of_batch(
            summaries, _NUM_QUERY_TILES, start, chunks, batch * chunks, program
        )
        query_tiles_before += before
        num_query_tiles += total
        before, total = _sum_of_batch(
            summaries, _NUM_KEY_TILES, start, chunks, batch * chunks, program
        )
        key_tiles_before += before
        num_key_tiles += total
    if program == 0:
        tl.store(counts + _QUERY_TILES, num_query_tiles)
        tl.store(counts + _KEY_TILES, num_key_tiles)

    row = program // chunks
    chunk = program % chunks
    width = chunks * BLOCK
    offset = tl.cast(row, tl.int64) * length
    planes += tl.cast(row, tl.int64) * (PLANES * chunks * BLOCK)
    summaries += tl.cast(row, tl.int64) * (SUMMARIES * chunks)
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    cuts = tl.load(planes + _CUTS * width + position)
    real, gathered = _has(cuts, _REAL), _has(cuts, _IS_GATHERED)

    reads_kept = _has(cuts, _READS_KEPT)
    index = tl.arange(0, WIDTH)
    num_readers = _of_chunks(summaries, _NUM_READERS, 0, chunks, chunks, 0, WIDTH)
    readers_here = reads_kept.to(tl.int32)
    readers_before = tl.cumsum(readers_here, 0) - readers_here
    readers_before += tl.sum(tl.where(index < chunk, num_readers, 0), 0)
    slot = tl.where(
        reads_kept, readers_before, tl.sum(num_readers, 0) + position - readers_before
    )  # fmt: skip
    tl.store(
        reader_positions + offset + slot, tl.where(reads_kept, position, 0), mask=position < length
    )

    # The number of readers up to the end of each token's document.
    ends = _of_chunks(
        summaries, _FIRST_DOCUMENT_END, chunk + 1, chunks, chunks, _NOWHERE, WIDTH
    )  # fmt: skip
    end_chunk = tl.min(_at_or_nowhere(ends < _NOWHERE, index), 0)
    at_end = _of_chunks(
        summaries, _NUM_READERS_AT_DOCUMENT_END, chunk + 1, chunks, chunks, 0, WIDTH
    )  # fmt: skip
    behind = tl.where(index < end_chunk, num_readers, tl.where(index == end_chunk, at_end, 0))
    readers_stop = _at_or_nowhere(_has(cuts, _ENDS_DOCUMENT), readers_before + readers_here)
    readers_stop = _coming_min(readers_stop, tl.sum(behind, 0))

    # Both kinds of tiles are ranked in one scan: a chunk has fewer than 2**15 of each.
    starts_query_tile = _has(cuts, _STARTS_QUERY_TILE)
    starts_key_tile = _has(cuts, _STARTS_KEY_TILE)
    starts = tl.where(starts_query_tile, 1, 0) + tl.where(starts_key_tile, 65536, 0)
    ranks = tl.cumsum(starts, 0) - starts

    kept_before = planes + _KEPT_BEFORE * width
    tile = starts_query_tile
    run_start = tl.load(planes + _RUN_START * width + position, mask=tile, other=0)
    run_stop = tl.load(planes + _RUN_STOP * width + position, mask=tile, other=0)
    sees = tile & real
    key_start = tl.load(visible_from + offset + position, mask=sees, other=0)
    prefix_start = tl.load(kept_before + key_start, mask=sees, other=0)
    hidden_before = planes + _LAST_HIDDEN * width + run_start - 1
    hidden_before = tl.load(hidden_before, mask=sees & (run_start > 0), other=-1)
    key_start = tl.maximum(key_start, hidden_before + 1)
    prefix_stop = tl.load(kept_before + key_start, mask=sees, other=0)
    _store_query_tile(
        query_tiles, num_query_tiles - 1 - query_tiles_before - (ranks & 65535), tile,
        row, position, tl.minimum(position + _TILE, run_stop),
        tl.where(real, key_start, run_stop), prefix_start, prefix_stop, run_start, run_stop,
    )  # fmt: skip

    tile = starts_key_tile
    group_stop = tl.load(planes + _GROUP_STOP * width + position, mask=tile, other=0)
    stop = tl.minimum(position + _TILE, group_stop)
    query_stop = tl.load(visible_until + offset + position, mask=tile & real, other=0)
    query_stop = tl.where(real, query_stop, position)
    rank = tl.load(kept_before + position, mask=tile & gathered, other=0)
    # A document's last key is kept.
    last = tl.load(kept_before + group_stop - 1, mask=tile & gathered, other=0)
    _store_key_tile(
        key_tiles, key_tiles_before + (ranks >> 16), tile,
        row, tl.where(gathered, _GATHERED, _CONTIGUOUS),
        tl.where(gathered, rank, position),
        tl.where(gathered, tl.minimum(rank + _TILE, last + 1), stop),
        tl.where(gathered, readers_before, position),
        tl.where(gathered, readers_stop, query_stop),
    )  # fmt: skip
