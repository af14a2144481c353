"""``Move``: one launch between compact entries and a cache, as the loaders take it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The columns of ``Move.entries`` and of ``Move.tokens``.
KV_ADDRESS, SCALES_ADDRESS, FIRST_TOKEN, NUM_TOKENS = range(4)
ENTRY_COLUMNS = 4
OFFSET, SHIFT = range(2)
TOKEN_COLUMNS = 2

ALIGNMENT = 16  # bytes, which one thread of a kernel loads or stores at once
_MOST_UNITS = 2**31  # of 16 bytes, in an entry
_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ENTRY_DTYPES = (*_CACHE_DTYPES, torch.int8, torch.float8_e4m3fn)


@dataclass(eq=False)
class Move:
    """The rows to move, each ``head_dim`` elements: keys and values of some tokens in all layers.

    Row ``(layer, c, head, t)`` of entry ``e``, where c is 0 for keys and 1 for values, starts at element
    ``((layer * 2 + c) * num_kv_heads + head) * n * head_dim + t * head_dim`` of the entry, which has
    ``n`` tokens. In the cache it starts at element ``tokens[first + t, OFFSET] + head * head_stride``
    from the address ``bases[layer, c]``.

    The tables are int64 and must be readable where the move is made: on the cache's device, or in pinned
    host memory. They may be rewritten between replays of a captured move.

    Attributes:
        to_cache: whether entries are moved to the cache, or the cache's rows to entries of its dtype.
        num_layers, num_kv_heads, head_dim: of the entries and the cache.
        entries: ``[E, 4]``: the address of the entry's keys and values; the address of its scales (one
            float32 per row, in the same order), or 0; ``first``; ``n``.
        tokens: ``[N, 2]``: the offset in the cache, in elements; the key's rotation, in positions.
        bases: ``[num_layers, 2]``: addresses of the layers' keys and values.
        head_stride: of the cache, in elements.
        most_tokens: the largest ``n``.
        entry_dtype: floating, or int8 or float8_e4m3fn with scales.
        cache_dtype: bfloat16, float16 or float32; on a CPU also float64.
        device: the cache's.
        inv_freq: float64 ``[rotary_dim / 2]``, radians per position, to rotate keys with. None rotates
            no key, whatever ``tokens`` contains.
        interleaved: whether dimensions (2i, 2i + 1) are rotated as a pair, or (i, i + rotary_dim / 2).
        lengths: ``[num_layers]``, the address of each layer's token count (int64), which is set to
            ``length``; or None.
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
        """Whether bytes are moved unchanged."""
        return self.entry_dtype == self.cache_dtype and self.inv_freq is None


def kernel_reasons(move: Move) -> list[str]:
    """Why the loaders' kernels, which move 8 elements at a time, can't make this move.

    Addresses are checked if their table is on the CPU, so that this doesn't wait for a device.
    """
    size = move.cache_dtype.itemsize
    reasons = []
    if move.entry_dtype not in _ENTRY_DTYPES:
        reasons.append(f"expected entries in {_listed(_ENTRY_DTYPES)}, got {move.entry_dtype}")
    if move.cache_dtype not in _CACHE_DTYPES:
        reasons.append(f"expected a cache in {_listed(_CACHE_DTYPES)}, got {move.cache_dtype}")
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
    if rows * move.head_dim * size // ALIGNMENT >= _MOST_UNITS:
        reasons.append(f"expected entries of up to 2**31 units of 16 bytes, got {rows} rows")
    if move.inv_freq is not None:
        reasons += _rotation_reasons(move, move.inv_freq)
    reasons += _place_reasons(move)
    if move.head_stride * size % ALIGNMENT:
        reasons.append(
            f"expected a cache with a head_stride that is a multiple of {ALIGNMENT} bytes, got "
            f"{move.head_stride} elements of {size}"
        )
    return reasons + _address_reasons(move, size)


def _address_reasons(move: Move, size: int) -> list[str]:
    """Tables with a number that isn't a multiple of what the kernels need, a power of two.

    Such a number shows in the bitwise or of its column, which is checked first.
    """
    entry_alignment = min(ALIGNMENT, 8 * move.entry_dtype.itemsize)
    expected = (
        (move.entries, KV_ADDRESS, entry_alignment, "entries at addresses"),
        (move.entries, SCALES_ADDRESS, 4, "scales at addresses"),
        (move.tokens, OFFSET, ALIGNMENT // size, "tokens at offsets in the cache, in elements,"),
        (move.bases, 0, ALIGNMENT, "keys at addresses"),
        (move.bases, 1, ALIGNMENT, "values at addresses"),
    )
    union = {
        id(table): np.bitwise_or.reduce(table.numpy(), axis=0, initial=0).tolist()
        for table in (move.entries, move.tokens, move.bases)
        if table.device.type == "cpu"
    }
    reasons = []
    for table, column, alignment, what in expected:
        if id(table) in union and union[id(table)][column] % alignment:
            wrong = next(number for number in table[:, column].tolist() if number % alignment)
            reasons.append(f"expected {what} that are multiples of {alignment}, got {wrong}")
    return reasons


def _rotation_reasons(move: Move, inv_freq: Tensor) -> list[str]:
    rotary_dim = 2 * inv_freq.numel()
    if inv_freq.dtype != torch.float64:
        return [f"expected float64 inv_freq, got {inv_freq.dtype}"]
    if rotary_dim > move.head_dim or (rotary_dim % 16 and not move.interleaved):
        return [
            f"expected a rotary_dim up to head_dim {move.head_dim}, a multiple of 16 unless it is "
            f"interleaved, got {rotary_dim}"
        ]
    return []


def _place_reasons(move: Move) -> list[str]:
    """Tables that the device can't read, or can't read 16 bytes at a time."""
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
        alignment = ALIGNMENT if name in ("entries", "tokens") else 8
        if not table.is_contiguous() or table.data_ptr() % alignment:
            reasons.append(
                f"expected {name} contiguous and at a multiple of {alignment} bytes, got strides "
                f"{table.stride()} at {table.data_ptr()}"
            )
    return reasons


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
