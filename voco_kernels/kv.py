"""``CompactKV``: what is left of an image once its VoCo tokens have read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class CompactKV:
    """The keys and values of one image's VoCo tokens, in all layers (supplement, 2.3.1).

    For one token of LLaVA-1.5-7B in bf16 that is 2 * 32 layers * 4096 * 2 B = 0.52 MB, where all
    576 vision tokens take 302 MB. A batch is a list of these; the number of tokens may differ among
    them.

    Attributes:
        kv: floating ``[L, 2, Hkv, n, D]``, layer by layer the keys (0) and the values (1) of the n
            VoCo tokens. Keys are rotated already, for ``positions``.
        positions: int64 ``[n]``, rising: the position ids of the first pass.
        next_position: the position id at which text goes on, larger than all ``positions``. With it
            the second pass sees every token where one pass over the whole sequence would have it.

    Raises:
        TypeError, ValueError: shapes, dtypes or positions that don't fit together.
    """

    kv: Tensor
    positions: Tensor
    next_position: int

    def __post_init__(self) -> None:
        if self.kv.dim() != 5 or self.kv.shape[1] != 2 or 0 in self.kv.shape:
            raise ValueError(
                "expected kv as [layers, 2, kv_heads, tokens, head_dim] with at least one token, "
                f"got {list(self.kv.shape)}"
            )
        if not self.kv.dtype.is_floating_point or self.positions.dtype != torch.int64:
            raise TypeError(
                f"expected floating-point kv and int64 positions, got {self.kv.dtype} and "
                f"{self.positions.dtype}"
            )
        if self.positions.shape != (self.num_tokens,):
            raise ValueError(
                f"expected one position for each of the {self.num_tokens} tokens in kv, got "
                f"positions of shape {list(self.positions.shape)}"
            )
        rising = [-1, *self.positions.tolist(), self.next_position]
        if rising != sorted(set(rising)):
            raise ValueError(
                "expected positions >= 0 that rise, and next_position above them, got positions "
                f"{rising[1:-1]} and next_position {rising[-1]}"
            )

    @property
    def num_layers(self) -> int:
        return self.kv.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[2]

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[3]

    @property
    def head_dim(self) -> int:
        return self.kv.shape[4]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.kv.nbytes

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CompactKV:
        """The same entry on another device or in another dtype; itself where nothing changes."""
        kv = self.kv.to(device=device, dtype=dtype)
        positions = self.positions.to(device=device)
        if kv is self.kv and positions is self.positions:
            return self
        return CompactKV(kv, positions, self.next_position)

    def __repr__(self) -> str:
        return (
            f"CompactKV({self.num_tokens} tokens, {self.num_layers} layers, {self.num_kv_heads} "
            f"heads of {self.head_dim}, {str(self.kv.dtype).removeprefix('torch.')} on "
            f"{self.kv.device}, {self.nbytes} B, text goes on at position {self.next_position})"
        )
