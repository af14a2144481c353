"""What kernels walk: tiles of queries and tiles of keys, laid out along the mask's own structure.

Two facts make every tile simple. Call a key *hidden* if some later query of its document can't see it
(the vision tokens of a segment that text follows) and *kept* otherwise.

* Cut the queries into *runs* where a segment ends (and where documents or padding begin). Between the
  last hidden key before a run and the query itself, every key is visible: one contiguous stretch, causal
  at its end. What a run sees before that stretch are kept keys only, a contiguous range of the compact
  list ``kept``, all visible to all of the run (its *prefix*). So a text query behind 64 images with one
  VoCo token each reads a prefix of 63 keys, not 64 hidden blocks.
* Keys, in turn, are either hidden (read by a contiguous range of queries, causal at its start) or kept
  (read by a range of the compact list ``readers``: queries that see any kept key at all). Kept keys
  behind a document's last image are read by all that follows: contiguous again.

Tiles start where runs start, so no tile straddles a segment. ``docs/schedule.md`` has the pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voco_kernels.layout.scans import last_index_where, next_index_where, shift_left, shift_right

TILE = 128
"""Rows of a tile. Kernels with smaller blocks split it."""

MOST_TOKENS = 2**28
"""Of a batch, padding included: eight columns of int32 for each are what kernels can address."""

# Both tables of tiles have this many columns, and these are the elements of ``counts``.
TILE_COLUMNS = 8
QUERY_TILES, KEY_TILES = 0, 1

# Columns of a query tile: its row of the batch, its queries [start, stop), the first key of its
# contiguous stretch, its prefix [start, stop) in ``kept``, and the run it was cut from.
ROW, START, STOP, KEY_START, PREFIX_START, PREFIX_STOP, RUN_START, RUN_STOP = range(TILE_COLUMNS)

# Columns of a key tile: its row (ROW), and these. Contiguous (KIND 0): keys and queries are token
# positions. Gathered (KIND 1): keys [start, stop) are ranks in ``kept``, queries [start, stop) are ranks
# in ``readers``.
KIND, KEY_TILE_START, KEY_TILE_STOP, QUERY_START, QUERY_STOP = range(1, 6)
CONTIGUOUS, GATHERED = 0, 1


class Schedule(NamedTuple):
    """Tensors on the layout's device, int32, their shapes functions of ``[B, S]`` alone.

    Attributes:
        query_tiles: ``[B * S, 8]``, the first ``counts[0]`` rows are tiles, the last row's last
            tile first: late queries see the most keys, and long work is best started early.
        key_tiles: ``[B * S, 8]``, the first ``counts[1]`` rows are tiles, the first row's first
            tile first: early keys are seen by the most queries. What lies behind the tiles, in
            either table, is unspecified.
        counts: ``[2]``.
        kept: ``[B, S]``, the positions of each row's kept keys, in order; 0 behind the last.
        readers: ``[B, S]``, the positions of each row's queries that see any kept key; likewise.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    counts: Tensor
    kept: Tensor
    readers: Tensor

    def host_query_tiles(self) -> Tensor:
        """The query tiles that there are, by row and position, int64 ``[n, 8]`` on the CPU (a host
        sync on CUDA)."""
        return self.query_tiles[: int(self.counts[0])].flip(0).long().cpu()

    def host_runs(self) -> list[list[int]]:
        """One query tile for each run instead of one for each ``TILE`` rows of it, as lists; by row
        and position."""
        tiles = self.host_query_tiles()
        runs = tiles[tiles[:, START] == tiles[:, RUN_START]]
        runs[:, STOP] = runs[:, RUN_STOP]
        return runs.tolist()


def build_schedule(visible_from: Tensor, visible_until: Tensor) -> Schedule:
    """The schedule of a mask, integer ``[B, S]`` each; no host sync, shapes static."""
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
    # Behind a document's last hidden key and last change of visible_from (text behind the last image)
    # nothing is left to gather: keys and queries are contiguous up to the document's stop.
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
    """For each token, where the next group starts (S where none does)."""
    return next_index_where(shift_left(starts, True)) + 1


def _compact(flags: Tensor, rank: Tensor) -> Tensor:
    """int32 ``[B, S]``: the positions of the flagged tokens of each row, in order, then zeros."""
    batch, length = flags.shape
    position = torch.arange(length, device=flags.device).expand(batch, length)
    positions = torch.zeros(batch, length + 1, dtype=torch.long, device=flags.device)
    positions.scatter_(1, torch.where(flags, rank, length), torch.where(flags, position, 0))
    return positions[:, :length].int().contiguous()


def _select(flags: Tensor, *columns: Tensor, last_first: bool = False) -> tuple[Tensor, Tensor]:
    """The rows of ``columns`` where the flag is set, moved to the front of an int32 ``[B * S, C]``
    array, and their number. Like ``nonzero``, but of static shape."""
    flags = flags.flatten()
    rank = flags.long().cumsum(0)
    slot = rank[-1] - rank if last_first else rank - 1
    values = torch.stack([column.flatten() for column in columns], dim=1).int()
    selected = values.new_zeros(len(flags) + 1, len(columns))
    selected[torch.where(flags, slot, len(flags))] = values
    return selected[:-1], rank[-1]
