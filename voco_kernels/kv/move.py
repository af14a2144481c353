"""``Move``: one launch between compact entries and a cache, as the loaders take it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Move:
    """Rows of ``head_dim`` elements, of some tokens, in all ``num_layers`` layers, keys and values.

    Row ``(layer, c, head, t)`` of entry ``e`` (c is 0 for keys, 1 for values) lies at element
    ``((layer * 2 + c) * num_kv_heads + head) * n * head_dim + t * head_dim`` of the entry, n being its
    number of tokens, and at element ``tokens[first + t, 0] + head * head_stride`` from the address
    ``bases[layer, c]`` of the cache. The tables are int64 and can be read where the move is made: on the
    cache's device, or in pinned host memory. Whoever replays a captured move may write them anew.

    Attributes:
        to_cache: entries to the cache; or from the cache to entries, which are then of its dtype.
        entries: ``[E, 4]``: address of the entry's keys and values, address of its scales (float32, one
            a row, in the same order) or 0, ``first``, n.
        tokens: ``[N, 2]``: offset in the cache, in elements; by how many positions to rotate the key.
        bases: ``[num_layers, 2]``: addresses of the layers' keys and values.
        head_stride: of the cache, in elements.
        most_tokens: the largest n.
        entry_dtype: of the entries: floating, or int8 and float8_e4m3fn, which have scales.
        cache_dtype: of the cache: bfloat16, float16 or float32 (on a CPU also float64).
        inv_freq: float64 ``[rotary_dim / 2]``, radians a position, to rotate keys by; None: no key is
            rotated, whatever ``tokens`` says.
        interleaved: whether dimensions (2i, 2i + 1) turn together, or (i, i + rotary_dim / 2).
        lengths: ``[num_layers]``, addresses of an int64 each that becomes ``length``, the number of
            tokens that the cache then holds; or None.
        device: of the cache.
    """

    to_cache: bool
    num_layers: int
    num_kv_heads: int
    head_dim: int
    entries: Tensor
    tokens: Tensor
    bases: Tensor
    head_stride: int
    most_tokens: int
    entry_dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    inv_freq: Tensor | None = None
    interleaved: bool = False
    lengths: Tensor | None = None
    length: int = 0

    @property
    def num_entries(self) -> int:
        return self.entries.shape[0]

    @property
    def is_copy(self) -> bool:
        """Whether bytes go over as they are."""
        return self.entry_dtype == self.cache_dtype and self.inv_freq is None


_ALIGNMENT = 16  # bytes, what a thread loads or stores at once
_MOST_UNITS = 2**31  # of 16 bytes, in an entry
_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ENTRY_DTYPES = (*_CACHE_DTYPES, torch.int8, torch.float8_e4m3fn)


def kernel_reasons(move: Move) -> list[str]:
    """Why the loaders' kernels, which move 8 elements at a time, can't make this move.

    Addresses are looked at where their table is on the CPU, without waiting for a device.
    """
    size = move.cache_dtype.itemsize
    reasons = []
    if move.entry_dtype not in _ENTRY_DTYPES:
        reasons.append(f"expected entries in {_names(_ENTRY_DTYPES)}, got {move.entry_dtype}")
    if move.cache_dtype not in _CACHE_DTYPES:
        reasons.append(f"expected a cache in {_names(_CACHE_DTYPES)}, got {move.cache_dtype}")
    if not move.to_cache and not move.is_copy:
        reasons.append(
            f"expected a plain copy out of the cache, in {move.cache_dtype} and without inv_freq, got "
            f"{move.entry_dtype} {'without' if move.inv_freq is None else 'with'} it"
        )
    if not move.num_entries:
        reasons.append("expected at least one entry, got none")
    if move.head_dim % 8:
        reasons.append(f"expected head_dim a multiple of 8, got {move.head_dim}")
    rows = 2 * move.num_layers * move.num_kv_heads * move.most_tokens
    if rows * move.head_dim * size // _ALIGNMENT >= _MOST_UNITS:
        reasons.append(f"expected entries of up to 2**31 units of 16 bytes, got {rows} rows")
    if move.inv_freq is not None:
        reasons += _rotation_reasons(move)
    reasons += _place_reasons(move)
    if move.head_stride * size % _ALIGNMENT:
        reasons.append(
            f"expected a cache with a head_stride that is a multiple of {_ALIGNMENT} bytes, got "
            f"{move.head_stride} elements of {size}"
        )
    return reasons + _address_reasons(move, size)


def _address_reasons(move: Move, size: int) -> list[str]:
    """A number that isn't a multiple of a power of two shows in the bits of all numbers together."""
    expected = (
        (move.entries, 0, min(_ALIGNMENT, 8 * move.entry_dtype.itemsize), "entries at addresses"),
        (move.entries, 1, 4, "scales at addresses"),
        (move.tokens, 0, _ALIGNMENT // size, "tokens at offsets in the cache, in elements,"),
        (move.bases, 0, _ALIGNMENT, "keys at addresses"),
        (move.bases, 1, _ALIGNMENT, "values at addresses"),
    )
    together = {
        id(table): np.bitwise_or.reduce(table.numpy(), axis=0, initial=0).tolist()
        for table in (move.entries, move.tokens, move.bases)
        if table.device.type == "cpu"
    }
    reasons = []
    for table, column, alignment, what in expected:
        if id(table) in together and together[id(table)][column] % alignment:
            wrong = next(number for number in table[:, column].tolist() if number % alignment)
            reasons.append(f"expected {what} that are multiples of {alignment}, got {wrong}")
    return reasons


def _rotation_reasons(move: Move) -> list[str]:
    rotary_dim = 2 * move.inv_freq.numel()
    if move.inv_freq.dtype != torch.float64:
        return [f"expected float64 inv_freq, got {move.inv_freq.dtype}"]
    if rotary_dim > move.head_dim or (rotary_dim % 16 and not move.interleaved):
        return [
            f"expected a rotary_dim up to head_dim {move.head_dim}, a multiple of 16 unless it is "
            f"interleaved, got {rotary_dim}"
        ]
    return []


def _place_reasons(move: Move) -> list[str]:
    """Tables that the device can't read, or not at once."""
    reasons = []
    for name in ("entries", "tokens", "bases", "lengths", "inv_freq"):
        table = getattr(move, name)
        if table is None:
            continue
        on_host = table.device.type == "cpu" and move.device.type != "cpu"
        if not (table.is_pinned() if on_host else table.device == move.device):
            reasons.append(
                f"expected {name} on {move.device} or in pinned memory, got it on {table.device}"
                f"{', not pinned; call .pin_memory()' if on_host else ''}"
            )
        alignment = _ALIGNMENT if name in ("entries", "tokens") else 8
        if not table.is_contiguous() or table.data_ptr() % alignment:
            reasons.append(
                f"expected {name} contiguous and at a multiple of {alignment} bytes, got strides "
                f"{table.stride()} at {table.data_ptr()}"
            )
    return reasons


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
