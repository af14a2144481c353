"""``RowCache``: a static key/value cache whose rows are filled, read and freed individually.

Transformers' ``StaticCache`` has one length for all rows. Here each token comes with the row and slot
for its keys and values, so requests of any length can share a batch, join it and leave it. A token
attends to its row's slots up to its own, so stale slots after that need not be cleared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from voco_kernels.kv import cache_view


@dataclass
class Step:
    """Where the tokens of the next forward pass are stored, and what they attend to.

    Attributes:
        rows: int64 ``[b]``, each sequence's row.
        slots: int64 ``[b, T]``, each token's slot.
        span: number of slots that attention reads, from the first on; None if the tokens only attend to
            each other, causally.
        consecutive: rows are 0, 1, 2, ..., so they are read in place instead of gathered.
    """

    rows: Tensor
    slots: Tensor
    span: int | None
    consecutive: bool = False


class RowLayer(CacheLayerMixin):
    """One layer's ``keys`` and ``values``, both ``[rows, Hkv, slots, D]``."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, owner: RowCache) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the tensors exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Stores ``[b, Hkv, T, D]`` as the step says. Returns the keys and values to attend to."""
        step = self._owner.step
        rows = step.rows[:, None]
        self.keys[rows, :, step.slots] = key_states.transpose(1, 2)
        self.values[rows, :, step.slots] = value_states.transpose(1, 2)
        if step.span is None:
            return key_states, value_states
        keys, values = self.keys[:, :, : step.span], self.values[:, :, : step.span]
        if step.consecutive:
            return keys[: step.rows.shape[0]], values[: step.rows.shape[0]]
        return keys.index_select(0, step.rows), values.index_select(0, step.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never called: the engine makes its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0, because rows have different lengths; the engine passes positions."""
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


class RowCache(Cache):
    """Keys and values of all layers in one allocation, initially zeros.

    Args:
        num_layers, rows, kv_heads, slots, head_dim: shape ``[L, 2, rows, Hkv, slots, D]``.
        dtype, device: of the model.

    Attributes:
        step: to be set before each forward pass.
        views: for ``load_into`` and ``extract``, valid as long as the cache.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.memory = torch.zeros(
            num_layers, 2, rows, kv_heads, slots, head_dim, dtype=dtype, device=device
        )
        super().__init__(layers=[RowLayer(keys, values, self) for keys, values in self.memory])
        self.step: Step | None = None
        self.views = cache_view.views(self)

    def copy_row(self, source: int, target: int, slots: int) -> None:
        """Copies the first slots of one row to another, in all layers."""
        self.memory[:, :, target, :, :slots] = self.memory[:, :, source, :, :slots]

    def clear_row(self, row: int) -> None:
        """Fills a row with zeros, in all layers."""
        self.memory[:, :, row] = 0

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes
