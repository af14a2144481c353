"""``load_into`` and ``extract``: move compact entries into a key/value cache and out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from voco_kernels.integers import to_int
from voco_kernels.kv import cache_view
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import QUANTIZED_MAX, CompactKV, Rope
from voco_kernels.kv.placement import longest_row, place, resolve, rotation, row_numbers
from voco_kernels.kv.transfer import Transfer


def load_into(
    cache: Any,
    entries: CompactKV | Sequence[CompactKV | Sequence[CompactKV]],
    *,
    positions: Any = None,
    slots: Any = None,
    rows: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    loader: str | None = None,
) -> None:
    """Load compact entries into a key/value cache: keys and values of all layers in one launch.

    ::

        load_into(cache, entry)                                # one request
        load_into(cache, [a, b, c])                            # a batch of three
        load_into(cache, [[a, b], [c]])                        # two images in the first prompt
        load_into(cache, [a], rows=[5], slots=128)             # a request that joins a running batch
        load_into(PagedKV(layers, block_table), [a, b])        # blocks of a paged cache

    Args:
        cache: a ``DynamicCache`` or ``StaticCache`` of Transformers, with ``[B, Hkv, S, D]`` in each
            layer, or a ``PagedKV``. An empty ``DynamicCache`` is given its tensors. If layers are on
            several devices, there is one launch per device.
        entries: for each row an entry, or a sequence of them, one after another. Quantized entries are
            dequantized in float32 and rounded once. There is one launch per dtype. Entries may be on the
            cache's device or on the CPU, preferably in pinned memory: up to about 1 MB of that is read
            by the kernel directly.
        positions: rotate keys to these positions, in float32. For each row the first token's position
            (int) or all of them (int64 ``[n]``); if the row has several entries, a sequence of such
            values, one per entry. By default keys stay rotated as they are, and the result of two passes
            equals that of one.
        slots: for each row the first slot (int), or a sequence of first slots, one per entry; one int
            is used for all rows. By default rows start at slot 0, shorter rows are padded on the left
            (except in a paged cache), and the cache's length becomes the number of slots used. With
            ``slots`` the cache's length is not changed.
        rows: the cache's rows, one for each row of ``entries``; by default 0, 1, 2, ...
        dtype: for an empty ``DynamicCache``; by default the first entry's, or bfloat16 if that is
            quantized.
        device: for an empty ``DynamicCache``; by default the first entry's.
        loader: "cpu", "cuda" or "triton"; by default the first that can make the move.

    Raises:
        TypeError, ValueError: entries that don't fit the cache or each other (layers, heads, head_dim),
            rows or slots that it doesn't have or that are used twice, positions for entries without
            ``rope``. Raised before the cache is changed.
        NotImplementedError: no loader, or not the requested one, can make this move; with the reasons.
    """
    prepare_load(
        cache,
        entries,
        positions=positions,
        slots=slots,
        rows=rows,
        dtype=dtype,
        device=device,
        loader=loader,
    ).launch()


def extract(
    cache: Any,
    slots: Sequence[Sequence[int]] | Tensor,
    positions: Sequence[Sequence[int]] | Tensor,
    *,
    next_positions: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    rope: Rope | None = None,
    fingerprint: str = "",
    loader: str | None = None,
) -> list[CompactKV]:
    """Copy entries out of a key/value cache, in one launch; the inverse of ``load_into``.

    Args:
        cache: as in ``load_into``.
        slots: for each row, the slots of its VoCo tokens.
        positions: for each row, the position ids of these tokens, rising.
        next_positions: for each row, the position id of the text that follows; by default one more than
            the last position.
        rows: the cache's rows, one for each row of ``slots``; by default 0, 1, 2, ...
        rope: the model's, kept in the entries.
        fingerprint: the model's, kept in the entries.
        loader: as in ``load_into``.

    Returns:
        one entry per row, in new memory, on the cache's (first) device and in its dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as in ``load_into``.
    """
    transfer = prepare_extract(
        cache,
        slots,
        positions,
        next_positions=next_positions,
        rows=rows,
        rope=rope,
        fingerprint=fingerprint,
        loader=loader,
    )
    transfer.launch()
    return transfer.entries


def prepare_load(
    cache: Any,
    entries: CompactKV | Sequence[CompactKV | Sequence[CompactKV]],
    *,
    positions: Any = None,
    slots: Any = None,
    rows: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    loader: str | None = None,
) -> Transfer:
    """Check and prepare a ``load_into``, to launch it often or in a CUDA graph: see ``Transfer``.

    An empty ``DynamicCache`` is given its tensors, zeros, by this call. The entries' tensors may be on
    the meta device if their layers are fed as they arrive (``Transfer.feed``).
    """
    rows_of_entries = _rows_of(entries)
    flat = [entry for row in rows_of_entries for entry in row]
    _check_alike(flat)
    grows = cache_view.grows(cache)
    empty = grows and cache_view.is_empty(cache)
    _check_empty_options(empty, slots, rows, dtype, device)
    if grows and not empty and slots is None:
        raise ValueError(
            "expected slots with a DynamicCache that holds tokens, got none with one that holds "
            f"{cache.get_seq_length()} tokens; give slots=, or pass an empty DynamicCache"
        )
    views = [] if empty else cache_view.views(cache)
    if slots is None and rows is not None and views[0].lengths is not None:
        raise ValueError(
            "expected slots with rows of a cache that has one token count for all rows, got rows "
            f"{list(rows)} alone, which would set the length of every row; give slots=0"
        )
    numbers = row_numbers(rows, len(rows_of_entries))
    turn = rotation(rows_of_entries, numbers, positions)
    width = longest_row(rows_of_entries)
    length = width if slots is None else None
    if not empty:
        _check_fit(views, flat[0])
        pad_left = views[0].block_table is None
        offsets = place(views, rows_of_entries, numbers, slots, pad_left)
        return Transfer(views, flat, offsets, turn, length=length, loader=loader)
    undo = _give_tensors(cache, flat[0], len(rows_of_entries), width, dtype, device)
    try:
        views = cache_view.views(cache)
        offsets = place(views, rows_of_entries, numbers, slots, pad_left=True)
        return Transfer(views, flat, offsets, turn, length=length, loader=loader, undo=undo)
    except BaseException:
        undo()
        raise


def prepare_extract(
    cache: Any,
    slots: Sequence[Sequence[int]] | Tensor,
    positions: Sequence[Sequence[int]] | Tensor,
    *,
    next_positions: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    rope: Rope | None = None,
    fingerprint: str = "",
    loader: str | None = None,
) -> Transfer:
    """Check and prepare an ``extract``; each launch writes to the entries in ``Transfer.entries``."""
    views = cache_view.views(cache)
    first = views[0]
    num_layers = sum(len(view.layers) for view in views)
    slots_of_rows, positions_of_rows = _lists(slots, "slots"), _lists(positions, "positions")
    if rows is None:
        numbers = list(range(len(slots_of_rows)))
    else:
        numbers = [to_int(row, "a row") for row in rows]
    if next_positions is None:
        following = [row[-1] + 1 if row else 0 for row in positions_of_rows]
    else:
        following = [to_int(position, "a next position") for position in next_positions]
    counts = [len(each) for each in (slots_of_rows, positions_of_rows, following, numbers)]
    if not slots_of_rows or len(set(counts)) > 1:
        raise ValueError(
            "expected slots, positions, next_positions and rows for the same rows, at least one, got "
            f"{counts[0]}, {counts[1]}, {counts[2]} and {counts[3]}"
        )
    for row, its_slots, its_positions in zip(
        numbers, slots_of_rows, positions_of_rows, strict=True
    ):
        if not its_slots or len(its_slots) != len(its_positions):
            raise ValueError(
                "expected a slot for each position, at least one, got "
                f"{len(its_slots)} and {len(its_positions)} in row {row}"
            )
    placed = [
        (row, [to_int(slot, "a slot") for slot in its_slots])
        for row, its_slots in zip(numbers, slots_of_rows, strict=True)
    ]
    offsets = resolve(views, placed)
    entries = []
    for its_positions, next_position in zip(positions_of_rows, following, strict=True):
        shape = (num_layers, 2, first.num_kv_heads, len(its_positions), first.head_dim)
        entries.append(
            CompactKV(
                torch.empty(shape, dtype=first.dtype, device=first.device),
                torch.tensor(its_positions, dtype=torch.int64),
                next_position,
                rope=rope,
                fingerprint=fingerprint,
            )
        )
    return Transfer(views, entries, offsets, to_cache=False, loader=loader)


def _check_empty_options(
    empty: bool,
    slots: Any,
    rows: Sequence[int] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Raise ``ValueError`` for options that only an empty, or only a filled, cache takes."""
    if not empty and (dtype is not None or device is not None):
        raise ValueError(
            "expected dtype and device only with an empty DynamicCache, got "
            f"{device if dtype is None else dtype} with a cache that has its tensors"
        )
    if empty and (slots is not None or rows is not None):
        raise ValueError(
            "expected neither slots nor rows with an empty DynamicCache, which has none to choose from, "
            f"got {'slots' if rows is None else 'rows'}; leave them out, or load into a "
            "StaticCache(config=..., max_cache_len=...) after its early_initialization(batch_size, "
            "num_heads, head_dim, dtype, device)"
        )


def _give_tensors(
    cache: Any,
    entry: CompactKV,
    rows: int,
    width: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Callable[[], None]:
    if dtype is None:
        dtype = torch.bfloat16 if entry.dtype in QUANTIZED_MAX else entry.dtype
    if device is None:  # the meta device has no memory; entries there are fed from the CPU
        device = "cpu" if entry.device.type == "meta" else entry.device
    memory_device = torch.device(device)
    shape = (rows, entry.num_kv_heads, width, entry.head_dim)
    return cache_view.allocate(cache, entry.num_layers, shape, dtype, lambda _: memory_device)


def _rows_of(entries: Any) -> list[list[CompactKV]]:
    if isinstance(entries, CompactKV):
        return [[entries]]
    if not isinstance(entries, Sequence):
        raise TypeError(f"expected CompactKV entries in a list, got {type(entries).__name__}")
    rows = [[row] if isinstance(row, CompactKV) else list(row) for row in entries]
    for index, row in enumerate(rows):
        for entry in row:
            if not isinstance(entry, CompactKV):
                raise TypeError(
                    f"expected CompactKV entries, got {type(entry).__name__} in row {index}"
                )
    if not any(rows):
        raise ValueError("expected at least one compact entry, got none")
    return rows


def _lists(values: Any, name: str) -> list[list[int]]:
    rows = values.tolist() if isinstance(values, Tensor) else [list(row) for row in values]
    if any(not isinstance(row, list) for row in rows):
        raise ValueError(f"expected {name} for each row, [rows, n], got one dimension")
    return rows


def _check_alike(entries: Sequence[CompactKV]) -> None:
    first = entries[0]
    expected = (first.num_layers, first.num_kv_heads, first.head_dim)
    models: dict[str, int] = {}
    for index, entry in enumerate(entries):
        got = (entry.num_layers, entry.num_kv_heads, entry.head_dim)
        if got != expected:
            raise ValueError(
                "expected entries of one model, with (layers, kv_heads, head_dim) "
                f"{expected} as in entry 0, got {got} in entry {index}"
            )
        if entry.fingerprint:
            models.setdefault(entry.fingerprint, index)
    if len(models) > 1:
        found = ", ".join(f"{name!r} in entry {index}" for name, index in models.items())
        raise ValueError(
            f"expected entries of one model, got the fingerprints {found}; compress the images with "
            "one model"
        )


def _check_fit(views: Sequence[CacheView], entry: CompactKV) -> None:
    expected = (sum(len(view.layers) for view in views), views[0].num_kv_heads, views[0].head_dim)
    got = (entry.num_layers, entry.num_kv_heads, entry.head_dim)
    if got != expected:
        raise ValueError(
            f"expected entries for this cache, with (layers, kv_heads, head_dim) {expected}, got {got}; "
            "compress the images with the cache's model"
        )
