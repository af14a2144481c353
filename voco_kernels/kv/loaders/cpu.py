"""The loader for the CPU: strided copies by NumPy, arithmetic by torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from voco_kernels.kv.entry import Rope
from voco_kernels.kv.move import OFFSET, SHIFT, Move

# Bytes that are converted at a time, in the working dtype, so that they stay in the second-level cache.
_CONVERTED_AT_ONCE = 1 << 19


def missing() -> list[str]:
    return []


def unsupported(move: Move) -> list[str]:
    return [] if move.device.type == "cpu" else [f"expected a cache on the CPU, got {move.device}"]


def run(move: Move) -> None:
    bases, tokens = move.bases.numpy(), move.tokens.numpy()
    sizes = (move.num_kv_heads, move.head_stride, move.head_dim, move.cache_dtype.itemsize)
    for kv, scales, first, count in move.entries.tolist():
        offsets = tokens[first : first + count, OFFSET]
        if not move.is_copy:
            shift = move.tokens[first : first + count, SHIFT]
            for layers, values in _converted(move, kv, scales, shift):
                rows = CacheRows(bases[layers], offsets, *sizes)
                rows.write(0, values.flatten().view(torch.uint8).numpy())
            continue
        rows = CacheRows(bases, offsets, *sizes)
        memory = _array(kv, (rows.nbytes,), (1,), np.dtype(np.uint8))
        if move.to_cache:
            rows.write(0, memory)
        else:
            rows.read(memory)
    if move.lengths is not None:
        set_lengths(move.lengths, move.length)


def set_lengths(lengths: Tensor, length: int) -> None:
    """Write ``length`` to the int64 counters at these addresses."""
    for counter in _counters(lengths.numpy().tobytes()):
        counter.value = length


class CacheRows:
    """Slots of a cache in all its layers, addressed by the bytes of the compact entry that goes there.

    Args:
        bases: int64 ``[layers, 2]``, addresses of the layers' keys and values; the caller keeps them
            alive.
        offsets: int64 ``[n]``, where each token's slot begins, in elements from a base.
        num_kv_heads, head_dim: of the cache.
        head_stride: in elements.
        itemsize: bytes of an element.
    """

    def __init__(
        self,
        bases: np.ndarray,
        offsets: np.ndarray,
        num_kv_heads: int,
        head_stride: int,
        head_dim: int,
        itemsize: int,
    ) -> None:
        self._heads = num_kv_heads
        self._count = len(offsets)
        self._row = np.dtype((np.void, head_dim * itemsize))
        self._head_nbytes = self._count * self._row.itemsize
        self.nbytes = bases.size * num_kv_heads * self._head_nbytes
        grid = _grid(bases.tobytes())
        self._regular = grid is not None
        self._runs: list[_Run] = []
        for start, stop, step in _progressions(offsets):
            at = int(offsets[start]) * itemsize
            shape = (num_kv_heads, stop - start)
            strides = (head_stride * itemsize, step * itemsize)
            row = self._row
            if step == head_dim:  # adjacent tokens are one long row, and one memcpy
                row = np.dtype((np.void, (stop - start) * row.itemsize))
                shape, strides = (num_kv_heads, 1), (strides[0], row.itemsize)
            if grid is None:
                tensors = [_array(int(base) + at, shape, strides, row) for base in bases.flat]
                self._runs.append(_Run(start, stop, row, None, tensors))
            else:
                base, grid_shape, grid_strides = grid
                array = _array(base + at, grid_shape + shape, grid_strides + strides, row)
                self._runs.append(_Run(start, stop, row, array, []))

    def write(self, at: int, memory: np.ndarray | memoryview) -> None:
        """Write bytes ``at`` to ``at + len(memory)`` of the entry; both are multiples of a head's."""
        rows = np.frombuffer(memory, self._row).reshape(-1, self._count)
        self._copy(at // self._head_nbytes, rows, to_cache=True)

    def heads(self) -> list[memoryview] | None:
        """The memory of each head, in the entry's order; None if its tokens are not adjacent."""
        run = self._runs[0]
        if run.stop - run.start != self._count or run.row.itemsize != self._head_nbytes:
            return None
        tensors = (
            run.tensors if run.grid is None else [each for layer in run.grid for each in layer]
        )
        return [memoryview(head.view(np.uint8)) for tensor in tensors for head in tensor]

    def read(self, into: np.ndarray) -> None:
        """Read all bytes of the entry."""
        self._copy(0, into.view(self._row).reshape(-1, self._count), to_cache=False)

    def _copy(self, first: int, rows: np.ndarray, to_cache: bool) -> None:
        """Copy ``rows`` ``[heads, tokens]``, where heads are those of all layers' keys and values.

        ``first`` is the index of the first one.
        """
        if not self._regular and rows.nbytes == self.nbytes:
            for run in self._runs:
                pieces = rows.reshape(-1, self._heads, self._count)[..., run.start : run.stop]
                for cache, entry in zip(run.tensors, pieces.view(run.row), strict=True):
                    np.copyto(*((cache, entry) if to_cache else (entry, cache)))
            return
        heads, layer_heads, done = self._heads, 2 * self._heads, 0
        while done < len(rows):
            tensor, head = divmod(first + done, heads)
            layer, is_value = divmod(tensor, 2)
            # Whole layers at once if possible, or else the rest of this layer's keys or values.
            starts_layer = not head and not is_value
            layers = (len(rows) - done) // layer_heads if self._regular and starts_layer else 0
            count = layers * layer_heads if layers else min(heads - head, len(rows) - done)
            piece = rows[done : done + count]
            if layers:
                piece = piece.reshape(layers, 2, heads, -1)
            for run in self._runs:
                if run.grid is None:
                    cache = run.tensors[tensor][head : head + count]
                elif layers:
                    cache = run.grid[layer : layer + layers]
                else:
                    cache = run.grid[layer, is_value, head : head + count]
                entry = piece[..., run.start : run.stop].view(run.row)
                np.copyto(*((cache, entry) if to_cache else (entry, cache)))
            done += count


class _Run(NamedTuple):
    """Tokens whose slots are at equal distances, and their rows in the cache.

    Attributes:
        start, stop: the tokens, by their index in the entry.
        row: the dtype of a row: ``head_dim`` elements, or those of all tokens if these are adjacent.
        grid: ``[layers, 2, heads, tokens]`` rows, if the cache's tensors are at equal distances.
        tensors: otherwise ``[heads, tokens]`` rows for each layer's keys and values.
    """

    start: int
    stop: int
    row: np.dtype
    grid: np.ndarray | None
    tensors: list[np.ndarray]


def _converted(move: Move, kv: int, scales: int, shift: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """An entry's layers in the cache's dtype, a few at a time, dequantized and rotated.

    The arithmetic is in float32, or in float64 if either dtype is float64 and the entry isn't quantized.
    """
    shape = (move.num_layers, 2, move.num_kv_heads, len(shift), move.head_dim)
    entry = _tensor(kv, shape, move.entry_dtype)
    scale = _tensor(scales, (*shape[:4], 1), torch.float32) if scales else None
    working = torch.float32
    if not scales:
        both = torch.promote_types(move.cache_dtype, move.entry_dtype)
        working = torch.promote_types(working, both)
    rope = None if move.inv_freq is None else Rope(move.inv_freq.float(), move.interleaved)
    layer_nbytes = entry[0].numel() * working.itemsize
    layers_at_once = max(1, _CONVERTED_AT_ONCE // layer_nbytes)
    for start in range(0, move.num_layers, layers_at_once):
        layers = slice(start, min(start + layers_at_once, move.num_layers))
        values = entry[layers].to(working, copy=True)
        if scale is not None:
            values *= scale[layers]
        if rope is not None:
            values[:, 0] = rope.rotate(values[:, 0], shift)
        yield layers, values.to(move.cache_dtype)


def _progressions(offsets: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """``(start, stop, step)``: the pieces of ``offsets`` that are arithmetic progressions."""
    start, count = 0, len(offsets)
    while start < count:
        if start + 1 == count:
            yield start, count, 0
            return
        steps = np.diff(offsets[start:])
        breaks = np.flatnonzero(steps != steps[0])
        stop = start + 1 + int(breaks[0]) if len(breaks) else count
        yield start, stop, int(steps[0])
        start = stop


@lru_cache(maxsize=256)
def _grid(bases: bytes) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
    """Address, shape and strides of the tensors of a table of bases, if they are at equal distances.

    Tensors of one size that were allocated one after another mostly are, and can then be addressed as
    one NumPy array.
    """
    addresses = np.frombuffer(bases, dtype=np.int64).reshape(-1, 2)
    base = int(addresses[0, 0])
    across = int(addresses[0, 1]) - base
    along = int(addresses[1, 0]) - base if len(addresses) > 1 else 0
    regular = base + np.arange(len(addresses))[:, None] * along + np.array([0, across])
    return (base, addresses.shape, (along, across)) if np.array_equal(addresses, regular) else None


@lru_cache(maxsize=256)
def _counters(addresses: bytes) -> list[ctypes.c_int64]:
    return [
        ctypes.c_int64.from_address(each) for each in np.frombuffer(addresses, np.int64).tolist()
    ]


def _tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over contiguous memory; the caller keeps that alive."""
    size = int(np.prod(shape)) * dtype.itemsize
    array = _array(address, (size,), (1,), np.dtype(np.uint8))
    return torch.from_numpy(array).view(dtype).view(shape)


def _array(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """An array over memory that the caller keeps alive; strides in bytes."""
    return np.asarray(_Memory(address, shape, strides, dtype.str))


class _Memory:
    """An address with a shape, for ``np.asarray``."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }
