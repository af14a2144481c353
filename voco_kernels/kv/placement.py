"""Which entry goes to which slots of which row, and by how far its keys are rotated on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from voco_kernels.integers import is_integer, to_int
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import CompactKV


class Placement(NamedTuple):
    """Of one entry.

    Attributes:
        row, slots: of the cache, a slot for each of the n tokens.
        shift: int64 ``[n]``, positions to rotate the keys on by; None for none.
    """

    row: int
    slots: Sequence[int]
    shift: Tensor | None = None


def place(
    rows_of_entries: Sequence[Sequence[CompactKV]],
    positions: Any,
    slots: Any,
    rows: Sequence[int] | None,
    pad_left: bool,
) -> tuple[list[Placement], int]:
    """A placement for each entry in order, and the number of slots that the longest row takes.

    Arguments as in ``load_into``; with ``pad_left`` shorter rows stand at the end of the slots that the
    longest one takes, unless ``slots`` says something else.
    """
    count = len(rows_of_entries)
    rows = list(range(count)) if rows is None else [to_int(row, "a row") for row in rows]
    if len(rows) != count or len(set(rows)) != count:
        raise ValueError(f"expected {count} different rows, one for each of entries, got {rows}")
    lengths = [sum(entry.num_tokens for entry in row) for row in rows_of_entries]
    width = max(lengths)
    first_slots = [width - length if pad_left else 0 for length in lengths]
    slots_given = first_slots if slots is None else _for_rows(slots, count, "slots")
    positions_given = (
        [None] * count if positions is None else _for_rows(positions, count, "positions")
    )
    placements = []
    for row, entries, where, at in zip(
        rows, rows_of_entries, slots_given, positions_given, strict=True
    ):
        starts = _starts(entries, where, row)
        targets = _for_entries(at, entries, row)
        for entry, start, target in zip(entries, starts, targets, strict=True):
            its_slots = range(start, start + entry.num_tokens)
            placements.append(Placement(row, its_slots, _shift(entry, target)))
    return placements, width


def check(view: CacheView, placements: Sequence[Placement]) -> None:
    """Raise ``ValueError`` for rows and slots that the cache doesn't have, or that are taken twice."""
    taken: dict[int, set[int]] = {}
    for row, slots, _ in placements:
        if not 0 <= row < view.num_rows:
            raise ValueError(f"expected rows 0 to {view.num_rows - 1}, got {row}")
        if min(slots) < 0 or max(slots) >= view.num_slots:
            raise ValueError(
                f"expected slots 0 to {view.num_slots - 1}, got {min(slots)} to {max(slots)} in row "
                f"{row}; make the cache larger, or choose other slots"
            )
        in_row = taken.setdefault(row, set())
        expected = len(in_row) + len(slots)
        in_row.update(slots)
        if len(in_row) != expected:
            raise ValueError(
                f"expected every slot to be taken once, got {slots[0]} to {slots[-1]} of row {row} "
                "twice, or on top of others"
            )
    if view.block_table is not None:
        places = np.concatenate([view.offsets(row, slots) for row, slots, _ in placements])
        if len(np.unique(places)) != len(places):
            raise ValueError(
                "expected every slot to be taken once, got blocks that the block table names twice"
            )


def _for_rows(values: Any, count: int, name: str) -> list:
    """One value a row. An int serves every row; a tensor counts as a sequence of ints."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if is_integer(values):
        return [int(values)] * count
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"expected {name} as an int or a sequence of one for each of {count} rows, got "
            f"{type(values).__name__} {values!r}"
        )
    if len(values) != count:
        raise ValueError(f"expected {name} for each of {count} rows, got {len(values)}")
    return values


def _starts(entries: Sequence[CompactKV], where: Any, row: int) -> list[int]:
    if not entries:
        return []
    if not isinstance(where, Sequence | Tensor | np.ndarray):
        return list(
            accumulate(
                [entry.num_tokens for entry in entries[:-1]], initial=to_int(where, "a slot")
            )
        )
    starts = [to_int(start, "a slot") for start in where]
    if len(starts) != len(entries):
        raise ValueError(
            f"expected a first slot for each of the {len(entries)} entries in row {row}, got "
            f"{len(starts)}"
        )
    return starts


def _for_entries(at: Any, entries: Sequence[CompactKV], row: int) -> list:
    """The positions asked for, one value (an int, a tensor or None) an entry."""
    if at is None:
        return [None] * len(entries)
    if is_integer(at) or isinstance(at, Tensor):
        at = [at]
    if not isinstance(at, Sequence | np.ndarray):
        raise TypeError(
            f"expected positions as an int, a tensor or a sequence of one for each of the "
            f"{len(entries)} entries in row {row}, got {type(at).__name__} {at!r}"
        )
    at = list(at)
    if len(at) != len(entries):
        raise ValueError(
            f"expected positions for each of the {len(entries)} entries in row {row}, got {len(at)}"
        )
    return at


def _shift(entry: CompactKV, target: Any) -> Tensor | None:
    if target is None:
        return None
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if not isinstance(target, Tensor):
        target = to_int(target, "a position")
    shift = entry.moved(target) - entry.positions
    if not shift.any():
        return None
    if entry.rope is None:
        raise ValueError(
            "expected entries that know their rope where positions are given, got one without; "
            "compress the image with this version, or leave positions out"
        )
    positions = entry.positions + shift
    rising = positions.tolist()
    if rising != sorted(set(rising)) or rising[0] < 0:
        raise ValueError(f"expected positions >= 0 that rise, got {rising}")
    return shift.to(torch.int64)
