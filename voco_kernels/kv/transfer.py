"""``Transfer``: a move between entries and a cache, written down for its loader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from voco_kernels.kv import placement as kv_placement
from voco_kernels.kv.cache_view import CacheView
from voco_kernels.kv.entry import CompactKV, Rope
from voco_kernels.kv.loaders.cpu import CacheRows, set_lengths
from voco_kernels.kv.move import Move
from voco_kernels.kv.placement import Placement

# In the order in which they are asked. Each refuses devices that are not its own.
LOADERS = ("cpu", "cuda", "triton")
# In bytes. Up to here kernels read pinned host memory by themselves; more is copied to the device first,
# by the copy engine, which starts later and runs faster. Not measured yet: bench/kv.py times both ways.
STAGED_ABOVE = 1 << 20
_ALIGNMENT = 16  # bytes, of entries, for the kernels


class Transfer:
    """A move that was checked and written down, and can be launched any number of times.

    ``launch()`` waits for nothing and reads addresses from tables in memory, so that a CUDA graph can
    record it. A replay moves what the tables name at that time: ``replace`` names other entries. The
    recorded launch reads entries where they lie if they are on the device, or pinned and not above
    ``STAGED_ABOVE`` bytes together. The transfer must outlive the graph. It is one launch; one for each
    device and dtype where there are several.

    Attributes:
        entries: of the move, in order; to be filled, if it is one out of the cache.
    """

    def __init__(
        self,
        views: Sequence[CacheView],
        entries: Sequence[CompactKV],
        placements: Sequence[Placement],
        *,
        to_cache: bool = True,
        length: int | None = None,
        loader: str | None = None,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        kv_placement.check(views[0], placements)
        self.entries = list(entries)
        self._views = list(views)
        self._placements = list(placements)
        self._undo = undo
        self._length = length
        rope = _common_rope(entries, placements)
        # A launch takes entries of one dtype.
        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, entry in enumerate(self.entries):
            by_dtype.setdefault(entry.dtype, []).append(index)
        self._parts: list[_Part | _BytesPart] = []
        for view in self._views:
            for dtype, indices in by_dtype.items():
                as_it_is = to_cache and dtype == view.dtype and rope is None
                if view.device.type == "cpu" and as_it_is and loader in (None, "cpu"):
                    part = _BytesPart(view, indices, self.entries, placements, length)
                else:
                    part = _Part(
                        view, indices, self.entries, placements, rope, to_cache, length, loader
                    )
                self._parts.append(part)

    @property
    def reads_later(self) -> bool:
        """Whether what is fed may be read after ``feed`` has returned."""
        return any(view.device.type != "cpu" for view in self._views)

    def launch(self) -> None:
        """Make the move, on the current stream of each of the cache's devices."""
        if any(entry.device.type == "meta" for entry in self.entries):
            raise ValueError("expected entries with memory, got some on the meta device; feed them")
        for part in self._parts:
            part.launch()

    def replace(self, entries: Sequence[CompactKV]) -> None:
        """Name other entries, for the same slots and rotations.

        Launches that are under way still read the tables: synchronize with them first.

        Args:
            entries: like those before in number, shape, dtype, device and pinning; contiguous; and
                rotated for the same positions where these are rotated on.
        """
        kinds = [[_kind(entry) for entry in each] for each in (self.entries, entries)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"expected entries like those before, {kinds[0]}, got {kinds[1]}")
        for index, (old, new) in enumerate(zip(self.entries, entries, strict=True)):
            turns = self._placements[index].shift is not None
            if turns and not (
                torch.equal(old.positions, new.positions) and old.rope.same(new.rope)
            ):
                raise ValueError(
                    "expected the positions and the rope of the entry before, since its rotation is "
                    f"kept, got others in entry {index}; prepare another transfer"
                )
        self.entries = list(entries)
        for part in self._parts:
            part.name(self.entries)

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None = None) -> None:
        """Load some layers of one entry, whose own tensors are not looked at; ``commit()`` at the end.

        Args:
            index: of the entry.
            first_layer: of ``kv``.
            kv: ``[layers, 2, Hkv, n, D]``, contiguous.
            scales: ``[layers, 2, Hkv, n]``, of a quantized entry.
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
        wanted = None if entry.scales is None else kv.shape[:4]
        if (None if scales is None else scales.shape) != wanted:
            raise ValueError(
                f"expected scales of shape {wanted and list(wanted)}, got "
                f"{None if scales is None else list(scales.shape)}"
            )
        for part in self._parts:
            part.feed(index, first_layer, kv, scales)

    def _entry(self, index: int) -> CompactKV:
        if not 0 <= index < len(self.entries):
            raise ValueError(f"expected an entry from 0 to {len(self.entries) - 1}, got {index}")
        return self.entries[index]

    def takes_bytes(self, index: int) -> bool:
        """Whether an entry's bytes go into the cache as they are, and may be written with ``write``."""
        owners = [part for part in self._parts if part.owns(index)]
        return len(owners) == 1 and isinstance(owners[0], _BytesPart)

    def write(self, index: int, at: int, memory: memoryview) -> None:
        """As ``feed``, in pieces that need not be layers.

        Args:
            index: of an entry that ``takes_bytes``.
            at: where ``memory`` lies in the bytes of the entry's ``kv``.
            memory: its length and ``at`` are multiples of a head's bytes, ``n * D`` elements.
        """
        entry = self._entry(index)
        head = entry.num_tokens * entry.head_dim * entry.dtype.itemsize
        if at % head or len(memory) % head or not 0 <= at <= at + len(memory) <= entry.kv.nbytes:
            raise ValueError(
                f"expected whole heads of {head} bytes within {entry.kv.nbytes}, got {len(memory)} "
                f"bytes at {at}"
            )
        next(part for part in self._parts if part.owns(index)).rows[index].write(at, memory)

    def destinations(self, index: int) -> list[memoryview] | None:
        """Of an entry that ``takes_bytes``: each head's memory in the cache, in the entry's order, to be
        written by whoever brings the bytes; None where a head's tokens are not side by side."""
        return next(part for part in self._parts if part.owns(index)).rows[index].heads()

    def cancel(self) -> None:
        """What was fed is not to be used: an empty cache that was given tensors is empty again."""
        self._undo()

    def commit(self) -> None:
        """After the last ``feed``: the cache's length, where it is the transfer's to set."""
        if self._length is None:
            return
        for view in self._views:
            for counter in view.counters:
                counter.fill_(self._length)


class _BytesPart:
    """Of a transfer to a cache on the CPU, the entries whose bytes go there as they are: no tables."""

    def __init__(
        self,
        view: CacheView,
        indices: Sequence[int],
        entries: Sequence[CompactKV],
        placements: Sequence[Placement],
        length: int | None,
    ) -> None:
        self._view = view
        self._length = length
        self.rows = {
            index: CacheRows(
                view.bases.numpy(),
                view.offsets(placements[index].row, placements[index].slots),
                view.num_kv_heads,
                view.head_stride,
                view.head_dim,
                view.dtype.itemsize,
            )
            for index in indices
        }
        self.name(entries)

    def owns(self, index: int) -> bool:
        return index in self.rows

    def name(self, entries: Sequence[CompactKV]) -> None:
        self._tensors = {index: entries[index].kv for index in self.rows}

    def launch(self) -> None:
        layers = self._view.layers
        for index, rows in self.rows.items():
            rows.write(0, _bytes(self._tensors[index][layers.start : layers.stop]))
        if self._length is not None and self._view.lengths is not None:
            set_lengths(self._view.lengths, self._length)

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None) -> None:
        start, kv = _within(self._view.layers, first_layer, kv)
        if index in self.rows and len(kv):
            self.rows[index].write(start * kv[0].nbytes, _bytes(kv))


class _Part:
    """Of a transfer, the layers on one device and the entries of one dtype: one launch."""

    def __init__(
        self,
        view: CacheView,
        indices: Sequence[int],
        entries: Sequence[CompactKV],
        placements: Sequence[Placement],
        rope: Rope | None,
        to_cache: bool,
        length: int | None,
        loader: str | None,
    ) -> None:
        counts = [entries[index].num_tokens for index in indices]
        tokens = np.zeros((sum(counts), 2), dtype=np.int64)
        self._table: dict[int, tuple[int, int]] = {}  # of each entry: its first token, and how many
        first = 0
        for index, count in zip(indices, counts, strict=True):
            row, slots, shift = placements[index]
            tokens[first : first + count, 0] = view.offsets(row, slots)
            if shift is not None:
                tokens[first : first + count, 1] = shift.numpy()
            self._table[index] = (first, count)
            first += count
        on_host = partial(_on_host, device=view.device)
        sets_length = length is not None and view.lengths is not None
        self._view = view
        self._move = Move(
            to_cache=to_cache,
            num_layers=len(view.layers),
            num_kv_heads=view.num_kv_heads,
            head_dim=view.head_dim,
            entries=on_host(
                torch.from_numpy(np.array([(0, 0, *row) for row in self._table.values()]))
            ),
            tokens=on_host(torch.from_numpy(tokens)),
            bases=on_host(view.bases),
            head_stride=view.head_stride,
            most_tokens=max(counts),
            entry_dtype=entries[indices[0]].dtype,
            cache_dtype=view.dtype,
            device=view.device,
            inv_freq=None if rope is None else on_host(rope.inv_freq.double()),
            interleaved=rope is not None and rope.interleaved,
            lengths=on_host(view.lengths) if sets_length else None,
            length=length or 0,
        )
        self._kept: list[_Memory] = []
        self.name(entries)
        self._loader = choose(self._move, loader)

    def owns(self, index: int) -> bool:
        return index in self._table

    def name(self, entries: Sequence[CompactKV]) -> None:
        """Write the entries' addresses into the table."""
        layers = slice(self._view.layers.start, self._view.layers.stop)
        self._kept = []
        mine = [entries[index] for index in self._table]
        if mine[0].device.type == "meta":  # they will be fed
            return
        staged = self._view.device.type == "cuda" and (
            sum(entry.nbytes for entry in mine if _is_pinned(entry)) > STAGED_ABOVE
        )
        table = self._move.entries.numpy()
        for place, entry in enumerate(mine):
            memory = _memory(entry.kv[layers], entry.scales, layers, self._view.device, staged)
            self._kept.append(memory)
            table[place, :2] = memory.addresses()

    def launch(self) -> None:
        if self._move.to_cache:
            for memory in self._kept:
                memory.fill()
        self._run(self._move, self._kept)
        if not self._move.to_cache:
            for memory in self._kept:
                memory.drain()

    def feed(self, index: int, first_layer: int, kv: Tensor, scales: Tensor | None) -> None:
        start, kv = _within(self._view.layers, first_layer, kv)
        if index not in self._table or not len(kv):
            return
        skipped = self._view.layers.start + start - first_layer
        layers = slice(skipped, skipped + len(kv))
        memory = _memory(kv, scales, layers, self._view.device, staged=True)
        memory.fill()
        row = torch.from_numpy(np.array([(*memory.addresses(), *self._table[index])]))
        move = replace(
            self._move,
            num_layers=len(kv),
            entries=_on_host(row, self._view.device),
            bases=self._move.bases[start : start + len(kv)],
            most_tokens=self._table[index][1],
            lengths=None,
        )
        self._run(move, [memory])

    def _run(self, move: Move, memories: list[_Memory]) -> None:
        capturing = move.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and any(memory.originals for memory in memories):
            raise ValueError(
                "expected entries that kernels read where they lie, to be recorded in a graph, got "
                f"pageable ones or more than {STAGED_ABOVE} bytes on the host; move them to the device"
            )
        self._loader.run(move)
        if move.device.type == "cuda":
            _keep_until_done(move, memories)


def _within(layers: range, first_layer: int, kv: Tensor) -> tuple[int, Tensor]:
    """Of layers from ``first_layer`` on, those in ``layers``, and which of these is the first."""
    start = max(first_layer, layers.start)
    stop = max(start, min(first_layer + len(kv), layers.stop))
    return start - layers.start, kv[start - first_layer : stop - first_layer]


def _bytes(kv: Tensor) -> np.ndarray:
    return kv.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)


class _Memory(NamedTuple):
    """What a launch reads or writes of an entry: its own tensors, or copies on the cache's device.

    Attributes:
        kv, scales: as the launch sees them.
        originals: of each copy, the entry's tensor.
    """

    kv: Tensor
    scales: Tensor | None
    originals: tuple[Tensor, ...]

    def addresses(self) -> tuple[int, int]:
        return self.kv.data_ptr(), 0 if self.scales is None else self.scales.data_ptr()

    def fill(self) -> None:
        """Bring the copies up to date, on the current stream."""
        for copy, original in zip((self.kv, self.scales), self.originals, strict=False):
            copy.copy_(original, non_blocking=True)

    def drain(self) -> None:
        """Bring the entry up to date."""
        for copy, original in zip((self.kv, self.scales), self.originals, strict=False):
            original.copy_(copy)


def _memory(
    kv: Tensor, scales: Tensor | None, layers: slice, device: torch.device, staged: bool
) -> _Memory:
    tensors = [kv.contiguous()]
    if scales is not None:
        tensors.append(scales[layers].contiguous())
    copies = tensors
    if not all(_reachable(tensor, device, staged) for tensor in tensors):
        copies = [torch.empty_like(tensor, device=device) for tensor in tensors]
    scales = None if scales is None else copies[1]
    return _Memory(copies[0], scales, () if copies is tensors else tuple(tensors))


def _reachable(tensor: Tensor, device: torch.device, staged: bool) -> bool:
    if device.type == "cpu":
        return tensor.device == device
    if tensor.data_ptr() % _ALIGNMENT:
        return False  # a view that begins anywhere; a copy is aligned
    return tensor.device == device or (
        not staged and tensor.device.type == "cpu" and tensor.is_pinned()
    )


def choose(move: Move, loader: str | None) -> ModuleType:
    """The loader of that name, or the first that can make the move.

    Raises:
        ValueError: no loader has that name.
        NotImplementedError: it can't, or none can; with the reasons.
    """
    if loader is not None and loader not in LOADERS:
        raise ValueError(f"expected a loader of {', '.join(LOADERS)}, got {loader!r}")
    why_not = {}
    for name in LOADERS if loader is None else (loader,):
        module = import_module(f"voco_kernels.kv.loaders.{name}")
        why_not[name] = module.missing() or module.unsupported(move)
        if not why_not[name]:
            return module
    reasons = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in why_not.items())
    raise NotImplementedError(f"no loader can make this move:\n{reasons}")


def _common_rope(entries: Sequence[CompactKV], placements: Sequence[Placement]) -> Rope | None:
    """What the keys are rotated with; None where none is."""
    found = None
    for index, (entry, placement) in enumerate(zip(entries, placements, strict=True)):
        if placement.shift is None:
            continue
        found = found or entry.rope
        if not found.same(entry.rope):
            raise ValueError(
                f"expected entries of one model, got another rope in entry {index}; load them apart"
            )
    return found


def _kind(entry: CompactKV) -> tuple:
    pinned, contiguous = _is_pinned(entry), entry.kv.is_contiguous()
    return tuple(entry.kv.shape), entry.dtype, entry.device, pinned, contiguous


def _is_pinned(entry: CompactKV) -> bool:
    return entry.device.type == "cpu" and entry.kv.is_pinned()


def _on_host(table: Tensor, device: torch.device) -> Tensor:
    """The table where kernels on ``device`` can read it and the host can write it."""
    return table.pin_memory() if device.type == "cuda" else table


# Launches that may be under way, and what they read: pinned memory is not to be used again before.
_under_way: list[tuple[torch.cuda.Event, object]] = []
_under_way_lock = threading.Lock()


def _keep_until_done(move: Move, memories: list[_Memory]) -> None:
    if torch.cuda.is_current_stream_capturing():
        return  # the transfer is kept as long as the graph
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(move.device))
    with _under_way_lock:
        _under_way.append((event, (move, memories)))
        _under_way[:] = [launch for launch in _under_way if not launch[0].query()]
