"""What a key/value cache looks like to the loaders: addresses, strides, and which slot is where.

Nothing here imports Transformers: its caches are taken for what they have, ``layers`` with ``keys`` and
``values``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A paged cache: rows own blocks of slots through a block table, as in vLLM and FlashAttention.

    Attributes:
        layers: keys and values of each layer, both ``[num_blocks, block_size, Hkv, D]``.
        block_table: int32 or int64 ``[rows, blocks a row]``: slot ``s`` of row ``b`` lies in block
            ``block_table[b, s // block_size]`` at place ``s % block_size``. Entries of blocks that are
            not in use may hold anything. Best kept on the CPU: it is read there.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    block_table: Tensor

    def __post_init__(self) -> None:
        table = self.block_table
        if table.dim() != 2 or table.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "expected block_table as int32 or int64 [rows, blocks a row], got "
                f"{table.dtype} {list(table.shape)}"
            )
        if not self.layers:
            raise ValueError("expected at least one layer, got none")


@dataclass(frozen=True, eq=False)
class CacheView:
    """The layers of a cache that lie on one device, all with the same shape and strides.

    Attributes:
        layers: which of the model's.
        tensors: their keys and values, held so that the addresses stay good.
        bases: int64 ``[layers, 2]``, the addresses of keys and values.
        counters: the layers' counts of tokens, int64 scalars on the device, where the cache has such.
        lengths: int64 ``[layers]``, their addresses; or None.
        num_rows, num_slots: how many rows, and slots a row, may be addressed.
        num_kv_heads, head_dim, dtype, device: of every layer.
        row_stride, slot_stride, head_stride: in elements; a paged cache has a block's for a row's.
        block_table: int64 ``[rows, blocks a row]`` on the CPU, of a paged cache.
        num_blocks, block_size: of a paged cache; slots a block.
    """

    layers: range
    tensors: tuple[tuple[Tensor, Tensor], ...]
    bases: Tensor
    counters: tuple[Tensor, ...]
    lengths: Tensor | None
    num_rows: int
    num_slots: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    row_stride: int
    slot_stride: int
    head_stride: int
    block_table: Tensor | None = None
    num_blocks: int = 0
    block_size: int = 0

    def offsets(self, row: int, slots: Sequence[int]) -> np.ndarray:
        """Where the row's ``slots`` begin, int64 ``[len(slots)]``, in elements from a base.

        Raises:
            ValueError: a slot whose block the block table doesn't name.
        """
        slots = np.array(slots, dtype=np.int64)
        if self.block_table is None:
            return row * self.row_stride + slots * self.slot_stride
        column, place = np.divmod(slots, self.block_size)
        block = self.block_table[row].numpy()[column]
        if block.min() < 0 or block.max() >= self.num_blocks:
            bad = slots[(block < 0) | (block >= self.num_blocks)][0]
            raise ValueError(
                f"expected blocks 0 to {self.num_blocks - 1} for the slots in use, got block "
                f"{block.min() if block.min() < 0 else block.max()} for slot {bad} of row {row}"
            )
        return block * self.row_stride + place * self.slot_stride


def views(cache: Any) -> list[CacheView]:
    """One view a device, in the order of the layers. Reads no element of the cache but a block table.

    Making them takes a look at every layer, tens of microseconds. For a cache that is loaded into often
    and whose tensors stay where they are (StaticCache, PagedKV), keep the views and pass them in the
    cache's place. A block table is copied: views know it as it was.

    Raises:
        TypeError: something that has no layers with keys and values.
        ValueError: layers that were not initialized, differ in shape or strides, or slide.
    """
    if _are_views(cache):
        return list(cache)
    if isinstance(cache, PagedKV):
        pairs = [tuple(pair) for pair in cache.layers]
        return _by_device(pairs, (), cache.block_table)
    layers = _layers(cache)
    if not layers or any(_tensors(layer) is None for layer in layers):
        raise ValueError(
            f"expected a {type(cache).__name__} whose layers have their tensors, got one that is not "
            "initialized: call cache.early_initialization(batch_size, num_heads, head_dim, dtype, "
            "device), or run the model once"
        )
    for index, layer in enumerate(layers):
        if getattr(layer, "is_sliding", False):
            raise ValueError(
                f"expected layers that keep every token, got a sliding window in layer {index}: a "
                "compact entry's tokens would slide out of it"
            )
    counters = [getattr(layer, "cumulative_length", None) for layer in layers]
    counters = counters if all(isinstance(counter, Tensor) for counter in counters) else ()
    return _by_device([_tensors(layer) for layer in layers], counters, None)


def is_empty(cache: Any) -> bool:
    """Whether it is a cache that grows and has nothing in it yet."""
    if not grows(cache):
        return False
    held = [_tensors(layer) for layer in _layers(cache)]
    return all(pair is None or not pair[0].numel() for pair in held)


def grows(cache: Any) -> bool:
    """Whether it is a cache that grows with every token (a DynamicCache)."""
    if isinstance(cache, PagedKV) or _are_views(cache):
        return False
    return not any(hasattr(layer, "max_cache_len") for layer in _layers(cache))


def _are_views(cache: Any) -> bool:
    return (
        isinstance(cache, list | tuple)
        and len(cache) > 0
        and all(isinstance(view, CacheView) for view in cache)
    )


def allocate(
    cache: Any,
    num_layers: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device_of: Callable[[int], torch.device],
) -> Callable[[], None]:
    """Give an empty cache that grows zeros of ``shape`` ``[B, Hkv, S, D]`` in every layer.

    One allocation a device holds all its layers, keys and values: what is then moved lies regularly.

    Returns:
        what makes the cache empty again.
    """
    before = [(layer, dict(vars(layer))) for layer in _layers(cache)]

    def undo() -> None:
        del cache.layers[len(before) :]
        for layer, attributes in before:
            vars(layer).clear()
            vars(layer).update(attributes)

    devices = [torch.device(device_of(index)) for index in range(num_layers)]
    try:
        for device in dict.fromkeys(devices):
            mine = [index for index in range(num_layers) if devices[index] == device]
            memory = torch.zeros(len(mine), 2, *shape, dtype=dtype, device=device)
            for index, (keys, values) in zip(mine, memory, strict=True):
                # With nothing in it, update makes the layer what it has to be and copies nothing.
                cache.update(keys[:, :, :0], values[:, :, :0], index)
                layer = cache.layers[index]
                if getattr(layer, "is_sliding", False):
                    raise ValueError(
                        "expected layers that keep every token, got a sliding window in layer "
                        f"{index}: a compact entry's tokens would slide out of it"
                    )
                layer.keys, layer.values = keys, values
    except BaseException:
        undo()
        raise
    return undo


def _layers(cache: Any) -> list:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list | tuple):
        raise TypeError(
            "expected a cache with layers that have keys and values (DynamicCache, StaticCache) or a "
            f"PagedKV, got {type(cache).__name__}"
        )
    return layers


def _tensors(layer: Any) -> tuple[Tensor, Tensor] | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return None
    return keys, values


def _by_device(
    pairs: Sequence[tuple[Tensor, Tensor]], counters: Sequence[Tensor], block_table: Tensor | None
) -> list[CacheView]:
    found: list[CacheView] = []
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or pairs[stop][0].device != pairs[start][0].device:
            found.append(
                _view(range(start, stop), pairs[start:stop], counters[start:stop], block_table)
            )
            start = stop
    for view in found[1:]:
        sizes = [
            (each.num_rows, each.num_slots, each.num_kv_heads, each.head_dim)
            for each in (view, found[0])
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "expected all layers with the same (rows, slots, kv_heads, head_dim), got "
                f"{sizes[1]} from layer 0 on and {sizes[0]} from layer {view.layers[0]} on"
            )
    return found


def _view(
    layers: range,
    pairs: Sequence[tuple[Tensor, Tensor]],
    counters: Sequence[Tensor],
    block_table: Tensor | None,
) -> CacheView:
    first = pairs[0][0]
    if first.dim() != 4:
        raise ValueError(f"expected keys and values of four dimensions, got {list(first.shape)}")
    shape, strides, dtype, device = first.shape, first.stride(), first.dtype, first.device
    for index, pair in zip(layers, pairs, strict=True):
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            got = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if got != (shape, strides, dtype, device):
                raise ValueError(
                    f"expected every layer's keys and values like layer {layers[0]}'s keys, "
                    f"{dtype} {list(shape)} with strides {list(strides)} on {device}, got "
                    f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on "
                    f"{tensor.device} as the {name} of layer {index}"
                )
    overlap = any(step == 0 for step, size in zip(strides, shape, strict=True) if size > 1)
    if strides[3] != 1 or overlap:
        raise ValueError(
            "expected a contiguous last dimension and slots that don't overlap (as expand makes them), "
            f"got strides {list(strides)}; make the cache's tensors contiguous"
        )
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"expected a cache in a floating dtype of 16 bits or more, got {dtype}; a quantized cache "
            "has scales of its own, which nobody would set"
        )
    for counter in counters:
        if counter.dtype != torch.int64 or counter.numel() != 1 or counter.device != device:
            raise ValueError(
                f"expected cumulative_length as one int64 on {device}, got {counter.dtype} "
                f"{list(counter.shape)} on {counter.device}"
            )
    common = {
        "layers": layers,
        "tensors": tuple(pairs),
        "bases": torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in pairs]),
        "counters": tuple(counters),
        "lengths": torch.tensor([each.data_ptr() for each in counters]) if counters else None,
        "head_dim": shape[3],
        "dtype": dtype,
        "device": device,
    }
    if block_table is None:
        return CacheView(
            num_rows=shape[0],
            num_slots=shape[2],
            num_kv_heads=shape[1],
            row_stride=strides[0],
            slot_stride=strides[2],
            head_stride=strides[1],
            **common,
        )
    table = block_table.to("cpu", torch.int64, copy=True)
    return CacheView(
        num_rows=table.shape[0],
        num_slots=table.shape[1] * shape[1],
        num_kv_heads=shape[2],
        row_stride=strides[0],
        slot_stride=strides[1],
        head_stride=strides[2],
        block_table=table,
        num_blocks=shape[0],
        block_size=shape[1],
        **common,
    )
