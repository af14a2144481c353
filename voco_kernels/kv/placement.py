"""The cache slots that entries go to, and the rotation of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from voco_kernels.integers import is_integer, to_int
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import CompactKV, Rope


class Rotation(NamedTuple):
    """How far to rotate the keys of a transfer's tokens.

    Attributes:
        rope: the rope of every entry whose keys are rotated.
        shift: int64 ``[N]``, in positions, for the tokens of one entry after another; 0 leaves a key as
            it is.
    """

    rope: Rope
    shift: np.ndarray


def place(
    views: Sequence[CacheView],
    rows_of_entries: Sequence[Sequence[CompactKV]],
    rows: Sequence[int],
    slots: Any,
    pad_left: bool,
) -> list[np.ndarray]:
    """The offsets of the slots that the entries' tokens go to; see ``resolve``.

    Args:
        rows_of_entries: entries for each of ``rows``.
        slots: as in ``load_into``; None starts every row at slot 0.
        pad_left: with ``slots=None``, let shorter rows end where the longest one ends.
    """
    if slots is None:
        width = longest_row(rows_of_entries)
        padding = [width - _num_tokens(entries) for entries in rows_of_entries]
        slots = padding if pad_left else 0
    placed = []
    first_slots = _for_rows(slots, len(rows), "slots")
    for row, entries, first in zip(rows, rows_of_entries, first_slots, strict=True):
        starts = _starts(entries, first, row)
        placed += [
            (row, range(start, start + entry.num_tokens))
            for entry, start in zip(entries, starts, strict=True)
        ]
    return resolve(views, placed)


def resolve(
    views: Sequence[CacheView], placed: Sequence[tuple[int, Sequence[int]]]
) -> list[np.ndarray]:
    """The offsets of slots in each view: int64 ``[N]``, in elements from a layer's base.

    Args:
        placed: a row and its slots for each entry, none empty.

    Raises:
        ValueError: rows or slots that the cache doesn't have, or slots that are used twice.
    """
    first = views[0]
    for row, slots in placed:
        if not 0 <= row < first.num_rows:
            raise ValueError(f"expected rows 0 to {first.num_rows - 1}, got {row}")
        if min(slots) < 0 or max(slots) >= first.num_slots:
            raise ValueError(
                f"expected slots 0 to {first.num_slots - 1}, got {min(slots)} to {max(slots)} in row "
                f"{row}; make the cache larger, or choose other slots"
            )
    row_of_token = np.array([row for row, slots in placed for _ in slots], dtype=np.int64)
    slot_of_token = np.array([slot for _, slots in placed for slot in slots], dtype=np.int64)
    offsets = [view.offsets(row_of_token, slot_of_token) for view in views]
    if any(len(set(each.tolist())) < len(each) for each in offsets):
        raise _used_twice(row_of_token, slot_of_token)
    return offsets


def rotation(
    rows_of_entries: Sequence[Sequence[CompactKV]], rows: Sequence[int], positions: Any
) -> Rotation | None:
    """How to rotate keys so that they are at ``positions`` (as in ``load_into``).

    Returns:
        None if every key is there already.

    Raises:
        TypeError, ValueError: positions that don't fit the entries, or entries that can't be rotated.
    """
    if positions is None:
        return None
    shifts: list[np.ndarray] = []
    rope = None
    for row, entries, target in zip(
        rows, rows_of_entries, _for_rows(positions, len(rows), "positions"), strict=True
    ):
        for entry, at in zip(entries, _for_entries(target, entries, row), strict=True):
            shift = _shift(entry, at)
            if shift.any():
                rope = _checked_rope(entry, shift, rope, index=len(shifts))
            shifts.append(shift.numpy())
    return None if rope is None else Rotation(rope, np.concatenate(shifts))


def row_numbers(rows: Sequence[int] | None, count: int) -> list[int]:
    """``rows`` as ints, one for each of ``count`` rows of entries; by default 0, 1, 2, ..."""
    if rows is None:
        return list(range(count))
    numbers = [to_int(row, "a row") for row in rows]
    if len(numbers) != count or len(set(numbers)) != count:
        raise ValueError(f"expected {count} different rows, one for each of entries, got {numbers}")
    return numbers


def longest_row(rows_of_entries: Sequence[Sequence[CompactKV]]) -> int:
    """The largest number of tokens in a row."""
    return max(map(_num_tokens, rows_of_entries))


def _num_tokens(entries: Sequence[CompactKV]) -> int:
    return sum(entry.num_tokens for entry in entries)


def _used_twice(rows: np.ndarray, slots: np.ndarray) -> ValueError:
    seen = set()
    for place in zip(rows.tolist(), slots.tolist(), strict=True):
        if place in seen:
            return ValueError(
                f"expected every slot to be used once, got slot {place[1]} of row {place[0]} twice"
            )
        seen.add(place)
    return ValueError(
        "expected every slot to be used once, got slots that share memory: rows of the block table "
        "that name one block twice, or tensors that overlap"
    )


def _for_rows(values: Any, count: int, name: str) -> Sequence[Any]:
    """One value for each row. An int is used for every row; a tensor is a sequence of ints."""
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


def _starts(entries: Sequence[CompactKV], first: Any, row: int) -> list[int]:
    """The first slot of each entry in a row: all given, or one given and the entries side by side."""
    if not entries:
        return []
    if not isinstance(first, Sequence | Tensor | np.ndarray):
        sizes = [entry.num_tokens for entry in entries[:-1]]
        return list(accumulate(sizes, initial=to_int(first, "a slot")))
    starts = [to_int(start, "a slot") for start in first]
    if len(starts) != len(entries):
        raise ValueError(
            f"expected a first slot for each of the {len(entries)} entries in row {row}, got "
            f"{len(starts)}"
        )
    return starts


def _for_entries(target: Any, entries: Sequence[CompactKV], row: int) -> list[Any]:
    """The positions given for a row: one value (an int, a tensor or None) for each entry."""
    if target is None:
        return [None] * len(entries)
    if is_integer(target) or isinstance(target, Tensor):
        target = [target]
    if not isinstance(target, Sequence | np.ndarray):
        raise TypeError(
            f"expected positions as an int, a tensor or a sequence of one for each of the "
            f"{len(entries)} entries in row {row}, got {type(target).__name__} {target!r}"
        )
    targets = list(target)
    if len(targets) != len(entries):
        raise ValueError(
            f"expected positions for each of the {len(entries)} entries in row {row}, got "
            f"{len(targets)}"
        )
    return targets


def _shift(entry: CompactKV, target: Any) -> Tensor:
    """By how many positions to move each token: int64 ``[n]``."""
    if target is None:
        return torch.zeros_like(entry.positions)
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if not isinstance(target, Tensor):
        target = to_int(target, "a position")
    return entry.moved(target) - entry.positions


def _checked_rope(entry: CompactKV, shift: Tensor, rope: Rope | None, index: int) -> Rope:
    """The rope of entry ``index``, which is moved by ``shift``; ``rope`` is that of earlier ones."""
    if entry.rope is None:
        raise ValueError(
            "expected entries that know their rope where positions are given, got one without; "
            "compress the image with this version, or leave positions out"
        )
    positions = (entry.positions + shift).tolist()
    if positions != sorted(set(positions)) or positions[0] < 0:
        raise ValueError(f"expected positions >= 0 that rise, got {positions}")
    if rope is not None and not rope.same(entry.rope):
        raise ValueError(
            f"expected entries of one model, got another rope in entry {index}; load them separately"
        )
    return entry.rope
