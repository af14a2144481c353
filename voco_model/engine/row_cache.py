"""``RowCache``: one static key/value cache whose rows are filled, read and freed one by one.

Transformers' ``StaticCache`` counts its tokens for all rows together. Here each token says in which row
and slot its keys and values go, so that requests of any length share a batch, join it and leave it.
What a token sees is its row's slots up to its own: stale slots behind need not be cleared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from voco_kernels.kv import cache_view


@dataclass
class Step:
    """Where the tokens of the forward pass that is about to run go, and what they look at.

    Attributes:
        rows: int64 ``[b]``, each sequence's row.
        slots: int64 ``[b, T]``, each token's slot.
        span: slots that attention looks at, from the first on; None where the tokens see only each
            other, causally.
        consecutive: rows are 0, 1, 2, ...: they are looked at in place, not gathered.
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
        """Nothing: the tensors are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Writes ``[b, Hkv, T, D]`` where the step says; returns the keys and values to look at."""
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
        """Asked of nobody: the engine brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: there is no one length; the engine passes positions."""
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


class RowCache(Cache):
    """Keys and values of all layers in one allocation, zeros at first.

    Args:
        num_layers, rows, kv_heads, slots, head_dim: shape ``[L, 2, rows, Hkv, slots, D]``.
        dtype, device: of the model.

    Attributes:
        step: set before each forward pass.
        views: for ``load_into`` and ``extract``; the tensors stay where they are.
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
        """Makes the first slots of one row those of another, in all layers."""
        self.memory[:, :, target, :, :slots] = self.memory[:, :, source, :, :slots]

    def clear_row(self, row: int) -> None:
        """Zeros."""
        self.memory[:, :, row] = 0

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes
