"""``load_into`` and ``extract``: compact entries into a key/value cache and out, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from voco_kernels.integers import to_int
from voco_kernels.kv import cache_view
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import QUANTIZED_MAX, CompactKV, Rope
from voco_kernels.kv.placement import Placement, place
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
    """Put compact entries into a key/value cache: all layers, keys and values, in one launch.

    ::

        load_into(cache, entry)                                # one request
        load_into(cache, [a, b, c])                            # a batch of three
        load_into(cache, [[a, b], [c]])                        # two images in the first prompt
        load_into(cache, [a], rows=[5], slots=128)             # a request that joins a running batch
        load_into(PagedKV(layers, block_table), [a, b])        # blocks of a paged cache

    Args:
        cache: a ``DynamicCache`` or ``StaticCache`` of Transformers, with ``[B, Hkv, S, D]`` in each
            layer, or a ``PagedKV``. An empty ``DynamicCache`` is given its tensors. Layers may lie on
            several devices: then it is one launch a device.
        entries: for each row an entry, or a sequence of them, one after another. Quantized entries are
            dequantized: float32 arithmetic, rounded once. Different dtypes take a launch each. Entries
            may lie on the cache's device or on the CPU, best in pinned memory: up to about 1 MB is then
            read by the kernel directly.
        positions: where keys shall stand, to rotate them on by the difference in float32. For each row
            the first token's position (int) or all of them (int64 ``[n]``); a sequence of such, one an
            entry, where the row has several. By default keys stay as they were rotated, which is what
            makes two passes equal one.
        slots: for each row the first slot (int), or a sequence of them, one an entry; one int serves
            all rows. By default from slot 0 on, rows with fewer tokens padded on the left (not in a
            paged cache), and the cache's length becomes the number of slots taken. With ``slots`` no
            length is changed.
        rows: of the cache, one for each row of ``entries``; by default 0, 1, 2, ...
        dtype, device: of an empty ``DynamicCache``; by default the first entry's, bfloat16 if that is
            quantized.
        loader: "cpu", "cuda" or "triton"; by default the first that can.

    Raises:
        TypeError, ValueError: what doesn't fit: layers, heads, head_dim, rows, slots taken twice or
            outside the cache, positions without ``rope``. Raised before the cache is changed.
        NotImplementedError: no loader, or not the one asked for, can make this move; with the reasons.
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
    """Take entries out of a key/value cache, the way back of ``load_into``, in one launch.

    Args:
        cache: as in ``load_into``.
        slots: for each row, the slots of its VoCo tokens.
        positions: for each row, the position ids of these tokens, rising.
        next_positions: for each row, the position id at which text goes on; by default one more than
            its last position.
        rows: of the cache, one for each row of ``slots``; by default 0, 1, 2, ...
        rope, fingerprint: of the model, noted in the entries.
        loader: as in ``load_into``.

    Returns:
        One entry a row, on the cache's (first) device and in its dtype: copies.

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
    """``load_into`` up to the launch, for those who launch often, or in a CUDA graph: see ``Transfer``.

    An empty ``DynamicCache`` has its tensors, zeros, from here on. The entries' tensors may lie on the
    meta device if their layers are to be fed as they arrive (``Transfer.feed``).
    """
    rows_of_entries = _rows_of(entries)
    flat = [entry for row in rows_of_entries for entry in row]
    _check_alike(flat)
    fresh = cache_view.is_empty(cache)
    if not fresh and (dtype is not None or device is not None):
        raise ValueError(
            "expected dtype and device only with an empty DynamicCache, got "
            f"{device if dtype is None else dtype} with a cache that has its tensors"
        )
    if fresh and (slots is not None or rows is not None):
        raise ValueError(
            "expected neither slots nor rows with an empty DynamicCache, which has none to choose from, "
            f"got {'slots' if rows is None else 'rows'}; leave them out, or load into a "
            "StaticCache(config=..., max_cache_len=...) after its early_initialization(batch_size, "
            "num_heads, head_dim, dtype, device)"
        )
    if not fresh and slots is None and cache_view.grows(cache):
        raise ValueError(
            "expected an empty DynamicCache, or slots of one that has some, got one that holds "
            f"{cache.get_seq_length()} tokens, and no slots"
        )
    views = () if fresh else cache_view.views(cache)
    if slots is None and rows is not None and views[0].lengths is not None:
        raise ValueError(
            "expected slots with rows of a cache that counts its tokens for all rows together, got rows "
            f"{list(rows)} alone, which would set the length of every row; say slots=0"
        )
    pad_left = fresh or views[0].block_table is None
    placements, width = place(rows_of_entries, positions, slots, rows, pad_left)
    length = width if slots is None else None
    if not fresh:
        _check_fit(views, flat[0])
        return Transfer(views, flat, placements, length=length, loader=loader)
    undo = _give_tensors(cache, flat[0], len(rows_of_entries), width, dtype, device)
    try:
        views = cache_view.views(cache)
        return Transfer(views, flat, placements, length=length, loader=loader, undo=undo)
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
    """``extract`` up to the launch, with the entries to be filled in ``Transfer.entries``."""
    views = cache_view.views(cache)
    slots, positions = _lists(slots, "slots"), _lists(positions, "positions")
    rows = list(range(len(slots))) if rows is None else [to_int(row, "a row") for row in rows]
    following = [row[-1] + 1 if row else 0 for row in positions]
    following = (
        following
        if next_positions is None
        else [to_int(after, "a next position") for after in next_positions]
    )
    if not slots or not len(slots) == len(positions) == len(rows) == len(following):
        raise ValueError(
            "expected slots, positions, next_positions and rows for the same rows, at least one, got "
            f"{len(slots)}, {len(positions)}, {len(following)} and {len(rows)}"
        )
    num_layers = sum(len(view.layers) for view in views)
    first = views[0]
    entries, placements = [], []
    for row, its_slots, its_positions, after in zip(rows, slots, positions, following, strict=True):
        if not its_slots or len(its_slots) != len(its_positions):
            raise ValueError(
                "expected a slot for each position, at least one, got "
                f"{len(its_slots)} and {len(its_positions)} in row {row}"
            )
        shape = (num_layers, 2, first.num_kv_heads, len(its_slots), first.head_dim)
        entries.append(
            CompactKV(
                torch.empty(shape, dtype=first.dtype, device=first.device),
                torch.tensor(its_positions, dtype=torch.int64),
                after,
                rope=rope,
                fingerprint=fingerprint,
            )
        )
        placements.append(Placement(row, [to_int(slot, "a slot") for slot in its_slots]))
    return Transfer(views, entries, placements, to_cache=False, loader=loader)


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
    if device is None:  # of an entry that is still to come, nobody has said where
        device = "cpu" if entry.device.type == "meta" else entry.device
    device = torch.device(device)
    shape = (rows, entry.num_kv_heads, width, entry.head_dim)
    return cache_view.allocate(cache, entry.num_layers, shape, dtype, lambda _: device)


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
    models = {}
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
        told = ", ".join(f"{name!r} in entry {index}" for name, index in models.items())
        raise ValueError(
            f"expected entries of one model, got the fingerprints {told}; compress the images with one "
            "model"
        )


def _check_fit(views: Sequence[CacheView], entry: CompactKV) -> None:
    expected = (sum(len(view.layers) for view in views), views[0].num_kv_heads, views[0].head_dim)
    got = (entry.num_layers, entry.num_kv_heads, entry.head_dim)
    if got != expected:
        raise ValueError(
            f"expected entries for this cache, with (layers, kv_heads, head_dim) {expected}, got {got}; "
            "compress the images with the cache's model"
        )
