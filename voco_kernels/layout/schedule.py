"""The schedule that attention kernels follow: tables of query tiles and key tiles that cover the mask.

A key is *hidden* if some later query of its document can't see it (the vision tokens of a segment that
is followed by text), and *kept* otherwise. Every tile is simple because of two properties of the mask:

* Queries are cut into *runs*: a new run begins where a segment ends and where a document or padding
  begins. Every key between the last hidden key before a run and the query itself is visible: one
  contiguous range, causal at its end. Before that range a run sees only kept keys. They are a contiguous
  range of the compact list ``kept``, the run's *prefix*, and all of the run's queries see all of them.
  So a text query after 64 images with one VoCo token each reads a prefix of 63 keys instead of 64
  blocks of hidden keys.
* A hidden key is read by a contiguous range of queries, causal at its start. A kept key is read by a
  range of the compact list ``readers``, the queries that see any kept key at all. Kept keys after a
  document's last image are read by every later query of the document, again a contiguous range.

Tiles start where runs start, so no tile crosses the end of a segment. See the pictures in
``docs/schedule.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voco_kernels.layout.scans import last_index_where, next_index_where, shift_left, shift_right

TILE = 128
"""Rows in a tile. Kernels with smaller blocks split it."""

MOST_TOKENS = 2**28
"""Maximum tokens in a batch, including padding: offsets in the tile tables are int32."""

# The number of columns of both tile tables, and the indices of the elements of ``counts``.
TILE_COLUMNS = 8
QUERY_TILES, KEY_TILES = 0, 1

# Columns of a query tile: its row in the batch, its queries [start, stop), the first key of its
# contiguous range, its prefix [start, stop) in ``kept``, and the run [start, stop) that it is part of.
ROW, START, STOP, KEY_START, PREFIX_START, PREFIX_STOP, RUN_START, RUN_STOP = range(TILE_COLUMNS)

# Columns of a key tile: its row (ROW), its kind, its keys [start, stop) and its queries [start, stop).
# Contiguous (KIND 0): keys and queries are token positions. Gathered (KIND 1): keys are indices into
# ``kept``, and queries are indices into ``readers``.
KIND, KEY_TILE_START, KEY_TILE_STOP, QUERY_START, QUERY_STOP = range(1, 6)
CONTIGUOUS, GATHERED = 0, 1


class Schedule(NamedTuple):
    """int32 tensors on the layout's device, whose shapes depend only on ``[B, S]``.

    Attributes:
        query_tiles: ``[B * S, 8]``. The first ``counts[0]`` rows are tiles, in descending order of batch
            row and position: late queries see the most keys, and it is best to start long work early.
        key_tiles: ``[B * S, 8]``. The first ``counts[1]`` rows are tiles, in ascending order of batch
            row and position: early keys are seen by the most queries. In both tables, the rows after
            the tiles are unspecified.
        counts: ``[2]``, the numbers of query tiles and key tiles.
        kept: ``[B, S]``, the positions of each row's kept keys, in order, then zeros.
        readers: ``[B, S]``, the positions of each row's queries that see any kept key, in order, then
            zeros.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    counts: Tensor
    kept: Tensor
    readers: Tensor

    def host_query_tiles(self) -> Tensor:
        """The query tiles, sorted by row and position, int64 ``[n, 8]`` on the CPU (a host sync on
        CUDA)."""
        return self.query_tiles[: int(self.counts[0])].flip(0).long().cpu()

    def host_runs(self) -> list[list[int]]:
        """Like ``host_query_tiles``, but as lists, with one tile per run instead of one per ``TILE``
        queries."""
        tiles = self.host_query_tiles()
        runs = tiles[tiles[:, START] == tiles[:, RUN_START]]
        runs[:, STOP] = runs[:, RUN_STOP]
        return runs.tolist()


def build_schedule(visible_from: Tensor, visible_until: Tensor) -> Schedule:
    """Build the schedule of a mask given as integers ``[B, S]``. No host sync; shapes are static."""
    visible_from, visible_until = visible_from.long(), visible_until.long()
    batch, length = visible_from.shape
    position = torch.arange(length, device=visible_from.device).expand(batch, length)
    row = torch.arange(batch, device=visible_from.device)[:, None].expand(batch, length)
    zero = torch.zeros_like(position)

    real = visible_from <= position
    # A document's last token is kept, and a segment's last token lies in the segment's document.
    document_stop = visible_until.gather(1, (visible_until - 1).clamp(min=0))
    document_stop = torch.where(real, document_stop, 0)
    document_start = last_index_where(document_stop != shift_right(document_stop, -1))
    hidden = real & (visible_until < document_stop)
    kept = real & ~hidden
    kept_before = kept.long().cumsum(1) - kept.long()
    kept_total = kept.sum(1, keepdim=True)

    hidden_before = shift_right(last_index_where(hidden), -1)
    segment_stop = visible_until.gather(1, hidden_before.clamp(min=0))
    segment_ended = (hidden_before >= 0) & (segment_stop == position)
    view_changes = visible_from != shift_right(visible_from, -1)
    run_starts = segment_ended | view_changes
    run_start = last_index_where(run_starts)
    run_stop = _stop_of_group(run_starts)
    key_start = torch.maximum(visible_from, hidden_before.gather(1, run_start) + 1)
    key_start = torch.where(real, key_start, run_stop)  # padding: no keys
    at = lambda index: kept_before.gather(1, index.clamp(max=length - 1))  # noqa: E731
    prefix_start = torch.where(real, at(visible_from), zero)
    prefix_stop = torch.where(real, at(key_start), zero)
    query_tiles, query_count = _select(
        (position - run_start) % TILE == 0,
        row,
        position,
        torch.minimum(position + TILE, run_stop),
        key_start,
        prefix_start,
        prefix_stop,
        run_start,
        run_stop,
        last_first=True,
    )

    reads_kept = real & (kept_before + kept.long() > at(visible_from))
    readers_before = reads_kept.long().cumsum(1) - reads_kept.long()
    readers_total = reads_kept.sum(1, keepdim=True)
    before_stop = lambda count, total: torch.cat([count, total], 1).gather(1, document_stop)  # noqa: E731
    rank_in_document = kept_before - kept_before.gather(1, document_start.clamp(min=0))

    group_starts = (kept != shift_right(kept, False)) | (
        visible_until != shift_right(visible_until, -1)
    )
    group_start, group_stop = last_index_where(group_starts), _stop_of_group(group_starts)
    # After a document's last hidden key and last change of visible_from (text after the last image),
    # nothing needs gathering: keys and queries are contiguous up to the document's stop.
    stays = torch.minimum(_stop_of_group(view_changes), _stop_of_group(hidden))
    gathered = kept & (stays < document_stop)
    key_tiles, key_count = _select(
        torch.where(kept, rank_in_document % TILE == 0, (position - group_start) % TILE == 0),
        row,
        gathered.long(),
        torch.where(gathered, kept_before, position),
        torch.where(
            gathered,
            torch.minimum(kept_before + TILE, before_stop(kept_before, kept_total)),
            torch.minimum(position + TILE, torch.where(kept, document_stop, group_stop)),
        ),
        torch.where(gathered, readers_before, position),
        torch.where(
            gathered,
            before_stop(readers_before, readers_total),
            torch.where(real, visible_until, position),  # padding: no queries
        ),
        zero,
        zero,
    )
    return Schedule(
        query_tiles,
        key_tiles,
        torch.stack([query_count, key_count]).int(),
        _compact(kept, kept_before),
        _compact(reads_kept, readers_before),
    )


def _stop_of_group(starts: Tensor) -> Tensor:
    """For each token, where the next group starts (S if there is none)."""
    return next_index_where(shift_left(starts, True)) + 1


def _compact(flags: Tensor, rank: Tensor) -> Tensor:
    """int32 ``[B, S]``: the positions of each row's flagged tokens, in order, then zeros."""
    batch, length = flags.shape
    position = torch.arange(length, device=flags.device).expand(batch, length)
    positions = torch.zeros(batch, length + 1, dtype=torch.long, device=flags.device)
    positions.scatter_(1, torch.where(flags, rank, length), torch.where(flags, position, 0))
    return positions[:, :length].int().contiguous()


def _select(flags: Tensor, *columns: Tensor, last_first: bool = False) -> tuple[Tensor, Tensor]:
    """The values of ``columns`` at flagged tokens, moved to the front of an int32 ``[B * S, C]`` tensor,
    and their number. Like ``nonzero``, but with a static shape."""
    flags = flags.flatten()
    rank = flags.long().cumsum(0)
    slot = rank[-1] - rank if last_first else rank - 1
    values = torch.stack([column.flatten() for column in columns], dim=1).int()
    selected = values.new_zeros(len(flags) + 1, len(columns))
    selected[torch.where(flags, slot, len(flags))] = values
    return selected[:-1], rank[-1]
