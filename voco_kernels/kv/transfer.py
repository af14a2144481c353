"""``Transfer``: prepared launches that move entries into a cache or out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from voco_kernels.kv import staging
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.loaders import dispatch
from voco_kernels.kv.loaders.cpu import CacheRows, set_lengths
from voco_kernels.kv.move import KV_ADDRESS, SCALES_ADDRESS, Move
from voco_kernels.kv.placement import Rotation
from voco_kernels.kv.staging import EntryMemory


class Transfer:
    """Entries and the slots that they move to or from, checked, and ready to be launched many times.

    There is one launch for each device of the cache and each dtype of the entries. ``launch()`` doesn't
    wait for the device and reads addresses from tables in memory, so a CUDA graph can record it. A
    replay moves the entries that the tables name at that time, which ``replace`` changes. A launch can
    be recorded if the entries are on the device, or in pinned memory and not larger than
    ``staging.STAGED_ABOVE`` bytes together. The transfer must outlive the graph.

    Attributes:
        entries: in order; a transfer out of the cache writes to them.
    """

    def __init__(
        self,
        views: Sequence[CacheView],
        entries: Sequence[CompactKV],
        offsets: Sequence[np.ndarray],
        rotation: Rotation | None = None,
        *,
        to_cache: bool = True,
        length: int | None = None,
        loader: str | None = None,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """Use ``prepare_load`` or ``prepare_extract``, which check what is passed here.

        Args:
            views: of the cache.
            entries: from one model.
            offsets: for each view, the slots of all tokens, as ``placement.resolve`` returns them.
            rotation: of the same tokens; None if no key is rotated.
            to_cache: the direction.
            length: the number of tokens that the cache holds afterwards; None leaves its counters alone.
            loader: a name, or None for the first loader that can.
            undo: called by ``cancel``.
        """
        self.entries = list(entries)
        self._views = list(views)
        self._rotation = rotation
        self._length = length
        self._undo = undo
        counts = [entry.num_tokens for entry in self.entries]
        starts = list(accumulate(counts[:-1], initial=0))
        self._spans = list(zip(starts, counts, strict=True))
        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, entry in enumerate(self.entries):
            by_dtype.setdefault(entry.dtype, []).append(index)
        self._launches: list[_HostCopy | _Launch] = []
        for view, view_offsets in zip(self._views, offsets, strict=True):
            for dtype, indices in by_dtype.items():
                spans = {index: self._spans[index] for index in indices}
                is_copy = to_cache and dtype == view.dtype and rotation is None
                if view.device.type == "cpu" and is_copy and loader in (None, "cpu"):
                    copy = _HostCopy(view, self.entries, spans, view_offsets, length)
                    self._launches.append(copy)
                    continue
                move = _move(view, spans, dtype, view_offsets, rotation, to_cache, length)
                self._launches.append(_Launch(view, self.entries, spans, move, loader))

    @property
    def reads_later(self) -> bool:
        """Whether the tensors given to ``feed`` may still be read after it has returned."""
        return any(view.device.type != "cpu" for view in self._views)

    def launch(self) -> None:
        """Move the entries, on the current stream of each of the cache's devices."""
        if any(entry.device.type == "meta" for entry in self.entries):
            raise ValueError("expected entries with memory, got some on the meta device; feed them")
        for launch in self._launches:
            launch.run()

    def replace(self, entries: Sequence[CompactKV]) -> None:
        """Use other entries, with the same slots and rotations.

        Launches that have not finished read the same tables: synchronize with them first.

        Args:
            entries: like the present ones in number, shape, dtype, device, pinning and contiguity, and
                in positions and rope where keys are rotated.

        Raises:
            ValueError: entries that differ in any of these.
        """
        present, given = ([_kind(entry) for entry in each] for each in (self.entries, entries))
        if present != given:
            raise ValueError(f"expected entries like those before, {present}, got {given}")
        for index, (old, new) in enumerate(zip(self.entries, entries, strict=True)):
            if self._rotates(index) and not (
                torch.equal(old.positions, new.positions)
                and new.rope is not None
                and new.rope.same(old.rope)
            ):
                raise ValueError(
                    "expected the positions and the rope of the entry before, since its rotation is "
                    f"kept, got others in entry {index}; prepare another transfer"
                )
        self.entries = list(entries)
        for launch in self._launches:
            launch.assign(self.entries)

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None = None) -> None:
        """Load some layers of one entry from ``kv`` instead of the entry's own tensors.

        After the last one, call ``commit`` or ``cancel``.

        Args:
            index: the entry's.
            first_layer: the layer of ``kv[0]``.
            kv: ``[layers, 2, Hkv, n, D]``, contiguous.
            scales: ``[layers, 2, Hkv, n]`` if the entry is quantized.
        """
        entry = self._entry(index)
        sizes = (*entry.kv.shape[1:],)
        if (
            kv.shape[1:] != sizes
            or not 0 <= first_layer <= first_layer + len(kv) <= entry.num_layers
            or kv.dtype != entry.dtype
        ):
            raise ValueError(
                f"expected {entry.dtype} {['layers', *sizes]} within {entry.num_layers} layers, got "
                f"{kv.dtype} {list(kv.shape)} from layer {first_layer} on"
            )
        expected = None if entry.scales is None else list(kv.shape[:4])
        got = None if scales is None else list(scales.shape)
        if got != expected:
            raise ValueError(f"expected scales of shape {expected}, got {got}")
        for launch in self._launches:
            launch.feed(index, first_layer, kv, scales)

    def takes_bytes(self, index: int) -> bool:
        """Whether an entry's bytes go into the cache unchanged, so that ``write`` can be used."""
        return self._cache_rows(index) is not None

    def write(self, index: int, at: int, memory: memoryview) -> None:
        """Like ``feed``, but the pieces need not be layers.

        Args:
            index: of an entry for which ``takes_bytes`` is true.
            at: the position of ``memory`` in the bytes of the entry's ``kv``.
            memory: its length and ``at`` are multiples of a head's bytes, ``n * D`` elements.
        """
        entry, rows = self._entry(index), self._checked_cache_rows(index)
        head = entry.num_tokens * entry.head_dim * entry.dtype.itemsize
        if at % head or len(memory) % head or not 0 <= at <= at + len(memory) <= entry.kv.nbytes:
            raise ValueError(
                f"expected whole heads of {head} bytes within {entry.kv.nbytes}, got {len(memory)} "
                f"bytes at {at}"
            )
        rows.write(at, memory)

    def destinations(self, index: int) -> list[memoryview] | None:
        """The memory of each head in the cache, in the entry's order, for the caller to fill.

        Args:
            index: of an entry for which ``takes_bytes`` is true.

        Returns:
            None if a head's tokens are not adjacent in the cache.
        """
        return self._checked_cache_rows(index).heads()

    def cancel(self) -> None:
        """Discard what was fed: a cache that was empty before is empty again."""
        self._undo()

    def commit(self) -> None:
        """After the last ``feed``: set the cache's length, unless slots were given."""
        if self._length is None:
            return
        for view in self._views:
            for counter in view.counters:
                counter.fill_(self._length)

    def _entry(self, index: int) -> CompactKV:
        if not 0 <= index < len(self.entries):
            raise ValueError(f"expected an entry from 0 to {len(self.entries) - 1}, got {index}")
        return self.entries[index]

    def _rotates(self, index: int) -> bool:
        if self._rotation is None:
            return False
        start, count = self._spans[index]
        return bool(self._rotation.shift[start : start + count].any())

    def _cache_rows(self, index: int) -> CacheRows | None:
        """The slots of an entry whose bytes are copied unchanged, to one device."""
        self._entry(index)
        launches = [launch for launch in self._launches if index in launch.spans]
        if len(launches) == 1 and isinstance(launches[0], _HostCopy):
            return launches[0].rows[index]
        return None

    def _checked_cache_rows(self, index: int) -> CacheRows:
        rows = self._cache_rows(index)
        if rows is None:
            raise ValueError(
                f"expected an entry whose bytes go into the cache unchanged, got entry {index}, which "
                "is converted, rotated or copied to another device; use feed"
            )
        return rows


class _HostCopy:
    """Entries whose bytes go unchanged into a cache on the CPU: copied at once, without tables.

    Attributes:
        spans: for the index of each of its entries, the first of its tokens and their number.
        rows: for the index of each of its entries, its slots.
    """

    def __init__(
        self,
        view: CacheView,
        entries: Sequence[CompactKV],
        spans: dict[int, tuple[int, int]],
        offsets: np.ndarray,
        length: int | None,
    ) -> None:
        self.spans = spans
        self._view = view
        self._length = length
        bases = view.bases.numpy()
        sizes = (view.num_kv_heads, view.head_stride, view.head_dim, view.dtype.itemsize)
        self.rows = {
            index: CacheRows(bases, offsets[start : start + count], *sizes)
            for index, (start, count) in spans.items()
        }
        self.assign(entries)

    def assign(self, entries: Sequence[CompactKV]) -> None:
        self._tensors = {index: entries[index].kv for index in self.spans}

    def run(self) -> None:
        layers = self._view.layers
        for index, rows in self.rows.items():
            rows.write(0, _bytes(self._tensors[index][layers.start : layers.stop]))
        if self._length is not None and self._view.lengths is not None:
            set_lengths(self._view.lengths, self._length)

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None) -> None:
        start, layers = _overlap(self._view.layers, first_layer, len(kv))
        kv = kv[layers]
        if index in self.spans and len(kv):
            self.rows[index].write(start * kv[0].nbytes, _bytes(kv))


class _Launch:
    """One launch of a loader: the layers on one device, and the entries of one dtype.

    Attributes:
        spans: for the index of each of its entries, the first of its tokens and their number.
    """

    def __init__(
        self,
        view: CacheView,
        entries: Sequence[CompactKV],
        spans: dict[int, tuple[int, int]],
        move: Move,
        loader: str | None,
    ) -> None:
        self.spans = spans
        self._view = view
        self._move = move
        self.assign(entries)
        self._loader = dispatch.choose(move, loader)  # addresses matter, too

    def assign(self, entries: Sequence[CompactKV]) -> None:
        """Write the entries' addresses into the table."""
        self._memories: list[EntryMemory] = []
        mine = [entries[index] for index in self.spans]
        if mine[0].device.type == "meta":  # they will be fed
            return
        layers = slice(self._view.layers.start, self._view.layers.stop)
        staged = staging.stages(mine, self._view.device)
        for row, entry in zip(self._move.entries.numpy(), mine, strict=True):
            scales = None if entry.scales is None else entry.scales[layers]
            memory = EntryMemory.of(entry.kv[layers], scales, self._view.device, staged)
            self._memories.append(memory)
            row[KV_ADDRESS], row[SCALES_ADDRESS] = memory.addresses()

    def run(self) -> None:
        if self._move.to_cache:
            for memory in self._memories:
                memory.copy_in()
        self._run(self._move, self._memories)
        if not self._move.to_cache:
            for memory in self._memories:
                memory.copy_out()

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None) -> None:
        start, layers = _overlap(self._view.layers, first_layer, len(kv))
        kv = kv[layers]
        if index not in self.spans or not len(kv):
            return
        scales = None if scales is None else scales[layers]
        memory = EntryMemory.of(kv, scales, self._view.device, staged=True)
        memory.copy_in()
        row = torch.tensor([(*memory.addresses(), *self.spans[index])])
        move = replace(
            self._move,
            num_layers=len(kv),
            entries=staging.host_table(row, self._view.device),
            bases=self._move.bases[start : start + len(kv)],
            most_tokens=self.spans[index][1],
            lengths=None,
        )
        self._run(move, [memory])

    def _run(self, move: Move, memories: list[EntryMemory]) -> None:
        on_cuda = move.device.type == "cuda"
        copied = any(memory.originals for memory in memories)
        if copied and on_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "expected entries that kernels can read in place, to record a launch in a graph, got "
                f"pageable ones or more than {staging.STAGED_ABOVE} bytes on the host; move them to "
                "the device"
            )
        self._loader.run(move)
        if on_cuda:
            staging.keep_until_done(move.device, (move, memories))


def _move(
    view: CacheView,
    spans: dict[int, tuple[int, int]],
    entry_dtype: torch.dtype,
    offsets: np.ndarray,
    rotation: Rotation | None,
    to_cache: bool,
    length: int | None,
) -> Move:
    """The tables of one launch, still without the entries' addresses."""

    def table(values: Tensor) -> Tensor:
        return staging.host_table(values, view.device)

    shift = np.zeros_like(offsets) if rotation is None else rotation.shift
    lengths = None if length is None or view.lengths is None else table(view.lengths)
    return Move(
        to_cache=to_cache,
        num_layers=len(view.layers),
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        entries=table(torch.tensor([(0, 0, *span) for span in spans.values()])),
        tokens=table(torch.from_numpy(np.stack((offsets, shift), axis=1))),
        bases=table(view.bases),
        head_stride=view.head_stride,
        most_tokens=max(count for _, count in spans.values()),
        entry_dtype=entry_dtype,
        cache_dtype=view.dtype,
        device=view.device,
        inv_freq=None if rotation is None else table(rotation.rope.inv_freq.double()),
        interleaved=rotation is not None and rotation.rope.interleaved,
        lengths=lengths,
        length=length or 0,
    )


def _overlap(layers: range, first_layer: int, count: int) -> tuple[int, slice]:
    """``count`` layers from ``first_layer`` on, as far as they are in ``layers``.

    Returns:
        the index in ``layers`` of the first of them, and where they are among the ``count``.
    """
    start = max(first_layer, layers.start)
    stop = max(start, min(first_layer + count, layers.stop))
    return start - layers.start, slice(start - first_layer, stop - first_layer)


def _bytes(kv: Tensor) -> np.ndarray:
    return kv.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)


def _kind(entry: CompactKV) -> tuple[object, ...]:
    pinned, contiguous = staging.is_pinned(entry), entry.kv.is_contiguous()
    return tuple(entry.kv.shape), entry.dtype, entry.device, pinned, contiguous
