"""Views of key/value caches: the addresses and strides by which loaders find a slot.

Transformers is not imported: any object whose ``layers`` have ``keys`` and ``values`` will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A paged cache: rows own blocks of slots through a block table, as in vLLM and FlashAttention.

    Attributes:
        layers: keys and values of each layer, both ``[num_blocks, block_size, Hkv, D]``.
        block_table: int32 or int64 ``[rows, blocks per row]``: slot ``s`` of row ``b`` is at index
            ``s % block_size`` of block ``block_table[b, s // block_size]``. Entries for blocks that are
            not in use may hold any value. Keep it on the CPU, where it is read.

    Raises:
        ValueError: a block table of another shape or dtype; no layers.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    block_table: Tensor

    def __post_init__(self) -> None:
        table = self.block_table
        if table.dim() != 2 or table.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "expected block_table as int32 or int64 [rows, blocks per row], got "
                f"{table.dtype} {list(table.shape)}"
            )
        if not self.layers:
            raise ValueError("expected at least one layer, got none")


@dataclass(frozen=True, eq=False)
class CacheView:
    """The layers of a cache that are on one device, all with the same shape and strides.

    Attributes:
        layers: their indices in the model.
        tensors: their keys and values, referenced so that the addresses stay valid.
        bases: int64 ``[layers, 2]``, the addresses of keys and values.
        counters: int64 scalars on the device, the layers' token counts; empty if the cache has none.
        lengths: int64 ``[layers]``, the addresses of ``counters``; None if there are none.
        num_rows, num_slots: rows in the cache, and slots per row.
        num_kv_heads, head_dim, dtype, device: the same for every layer.
        row_stride, slot_stride, head_stride: in elements; for a paged cache ``row_stride`` is a block's.
        block_table: int64 ``[rows, blocks per row]`` on the CPU; None if the cache is not paged.
        num_blocks, block_size: blocks in a paged cache, and slots per block; otherwise 0.
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

    def offsets(self, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Where slots begin, in elements from a layer's base.

        Args:
            rows, slots: int64 ``[N]``, a row and a slot that the cache has for each token.

        Returns:
            int64 ``[N]``.

        Raises:
            ValueError: the block table has no valid block for a slot.
        """
        if self.block_table is None:
            return rows * self.row_stride + slots * self.slot_stride
        columns, in_block = np.divmod(slots, self.block_size)
        blocks = self.block_table.numpy()[rows, columns]
        invalid = np.flatnonzero((blocks < 0) | (blocks >= self.num_blocks))
        if len(invalid):
            first = invalid[0]
            raise ValueError(
                f"expected blocks 0 to {self.num_blocks - 1} for the slots in use, got block "
                f"{blocks[first]} for slot {slots[first]} of row {rows[first]}"
            )
        return blocks * self.row_stride + in_block * self.slot_stride


def views(cache: Any) -> list[CacheView]:
    """One view per device, in the order of the layers. The cache's contents are not read.

    This visits every layer, which takes longer than a small entry takes to load. If you load into a
    cache often and its tensors stay where they are (StaticCache, PagedKV), keep the views and pass them
    instead of the cache. They hold a copy of the block table, and don't see later changes to it.

    Raises:
        TypeError: not a cache: it has no layers with keys and values.
        ValueError: layers that are not initialized, have a sliding window, or differ in shape, strides
            or dtype.
    """
    if _are_views(cache):
        return list(cache)
    if isinstance(cache, PagedKV):
        return _by_device([(keys, values) for keys, values in cache.layers], [], cache.block_table)
    layers = _layers(cache)
    pairs = [pair for layer in layers if (pair := _tensors(layer)) is not None]
    if not layers or len(pairs) < len(layers):
        raise ValueError(
            f"expected a {type(cache).__name__} whose layers have their tensors, got one that is not "
            "initialized: call cache.early_initialization(batch_size, num_heads, head_dim, dtype, "
            "device), or run the model once"
        )
    for index, layer in enumerate(layers):
        if getattr(layer, "is_sliding", False):
            raise _sliding_window(index)
    counters = [getattr(layer, "cumulative_length", None) for layer in layers]
    counted = [counter for counter in counters if isinstance(counter, Tensor)]
    return _by_device(pairs, counted if len(counted) == len(layers) else [], None)


def grows(cache: Any) -> bool:
    """Whether this cache grows with every token, as a DynamicCache does."""
    if isinstance(cache, PagedKV) or _are_views(cache):
        return False
    return not any(hasattr(layer, "max_cache_len") for layer in _layers(cache))


def is_empty(cache: Any) -> bool:
    """Whether this cache, one that ``grows``, has no tokens yet."""
    return not any(pair is not None and pair[0].numel() for pair in map(_tensors, _layers(cache)))


def _are_views(cache: Any) -> TypeGuard[Sequence[CacheView]]:
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
    device_of: Callable[[int], torch.device | str],
) -> Callable[[], None]:
    """Give every layer of an empty, growing cache zeros of ``shape`` ``[B, Hkv, S, D]``.

    The layers on one device share one allocation, keys and values alike, so that loaders find them at
    equal distances.

    Returns:
        a function that makes the cache empty again.
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
            indices = [index for index in range(num_layers) if devices[index] == device]
            memory = torch.zeros(len(indices), 2, *shape, dtype=dtype, device=device)
            no_tokens = memory[0, 0, :, :, :0]
            tensors = memory.flatten(0, 1).unbind()
            for index, keys, values in zip(indices, tensors[::2], tensors[1::2], strict=True):
                # Initializes the layer without copying.
                cache.update(no_tokens, no_tokens, index)
                layer = cache.layers[index]
                if getattr(layer, "is_sliding", False):
                    raise _sliding_window(index)
                layer.keys, layer.values = keys, values
    except BaseException:
        undo()
        raise
    return undo


def _sliding_window(layer: int) -> ValueError:
    return ValueError(
        f"expected layers that keep every token, got a sliding window in layer {layer}, which would "
        "drop an entry's tokens; use a cache without sliding layers"
    )


def _layers(cache: Any) -> Sequence[Any]:
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
    devices = [keys.device for keys, _ in pairs]
    found: list[CacheView] = []
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or devices[stop] != devices[start]:
            layers = slice(start, stop)
            found.append(_view(range(start, stop), pairs[layers], counters[layers], block_table))
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
    _check_tensors(layers, pairs)
    first = pairs[0][0]
    for counter in counters:
        if (counter.dtype, counter.numel(), counter.device) != (torch.int64, 1, first.device):
            raise ValueError(
                f"expected cumulative_length as one int64 on {first.device}, got {counter.dtype} "
                f"{list(counter.shape)} on {counter.device}"
            )
    bases = [address for keys, values in pairs for address in (keys.data_ptr(), values.data_ptr())]
    if block_table is None:
        num_rows, num_kv_heads, num_slots, head_dim = first.shape
        row_stride, head_stride, slot_stride, _ = first.stride()
        num_blocks = block_size = 0
    else:
        block_table = block_table.to("cpu", torch.int64, copy=True)
        num_blocks, block_size, num_kv_heads, head_dim = first.shape
        row_stride, slot_stride, head_stride, _ = first.stride()
        num_rows, num_slots = len(block_table), block_table.shape[1] * block_size
    return CacheView(
        layers=layers,
        tensors=tuple(pairs),
        bases=torch.tensor(bases).view(-1, 2),
        counters=tuple(counters),
        lengths=torch.tensor([each.data_ptr() for each in counters]) if counters else None,
        num_rows=num_rows,
        num_slots=num_slots,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=first.dtype,
        device=first.device,
        row_stride=row_stride,
        slot_stride=slot_stride,
        head_stride=head_stride,
        block_table=block_table,
        num_blocks=num_blocks,
        block_size=block_size,
    )


def _check_tensors(layers: range, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Raise ``ValueError`` unless all tensors are alike, and laid out as loaders can address them."""
    first = pairs[0][0]
    shape, strides, dtype, device = first.shape, first.stride(), first.dtype, first.device
    if len(shape) != 4:
        raise ValueError(f"expected keys and values of four dimensions, got {list(shape)}")
    for index, pair in zip(layers, pairs, strict=True):
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            if (
                tensor.shape != shape
                or tensor.stride() != strides
                or tensor.dtype != dtype
                or tensor.device != device
            ):
                raise ValueError(
                    f"expected every layer's keys and values like layer {layers[0]}'s keys, "
                    f"{dtype} {list(shape)} with strides {list(strides)} on {device}, got "
                    f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on "
                    f"{tensor.device} as the {name} of layer {index}"
                )
    overlap = any(step == 0 for step, size in zip(strides, shape, strict=True) if size > 1)
    if strides[3] != 1 or overlap:
        raise ValueError(
            "expected a contiguous last dimension and slots that don't overlap (as after expand), got "
            f"strides {list(strides)}; make the cache's tensors contiguous"
        )
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"expected a cache in a floating dtype of 16 bits or more, got {dtype}; quantized caches "
            "are not supported, because load_into can't set their scales"
        )
