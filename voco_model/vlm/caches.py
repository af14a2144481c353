"""Key/value caches of the two passes, as Transformers' cache objects."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlavaModel

from voco_kernels.kv.cache_view import allocate
from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import load_into

# The keyword of models and ``generate`` for a cache; past_key_values before Transformers 5.24.
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(LlavaModel.forward).parameters else "past_key_values"
)


class VoCoCollector(DynamicCache):
    """The cache of pass 1, which keeps only the keys and values of VoCo tokens.

    Each layer gets its full keys and values back, so no more than one layer's exist at a time: 1/32 of a
    full cache in LLaVA-1.5-7B.

    Args:
        columns: int64 ``[B, n]``, columns of the batch to keep.
    """

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.columns = columns
        self.collected: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        _, heads, _, head_dim = key_states.shape
        index = self.columns.to(key_states.device)[:, None, :, None].expand(-1, heads, -1, head_dim)
        self.collected.append(
            torch.stack([key_states.gather(2, index), value_states.gather(2, index)])
        )
        return key_states, value_states

    def kept(self) -> Tensor:
        """``[L, 2, B, Hkv, n, D]``, on the first layer's device."""
        device = self.collected[0].device
        return torch.stack([layer.to(device) for layer in self.collected])


class CompactCache(DynamicCache):
    """The cache that pass 2 starts from: one image's VoCo tokens per row.

    Its tensors are copies, so entries don't change when the cache grows. Entries with fewer tokens than
    the longest are padded on the left.

    Args:
        entries: one per row, with the same number of layers, heads and head_dim.
        layer_devices: the device of each layer's keys and values.
        dtype: the model's.

    Attributes:
        prefix_mask: bool ``[B, n]``, False for padding.
        prefix_positions: int64 ``[B, n]``, 0 for padding.
        next_position: int64 ``[B]``, the position id of the first text token.
    """

    def __init__(
        self,
        entries: Sequence[CompactKV],
        layer_devices: Sequence[torch.device],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        first, slots = entries[0], max(entry.num_tokens for entry in entries)
        shape = (len(entries), first.num_kv_heads, slots, first.head_dim)
        allocate(self, first.num_layers, shape, dtype, layer_devices.__getitem__)
        missing = [slots - entry.num_tokens for entry in entries]
        load_into(self, entries, slots=missing)
        positions = [
            F.pad(entry.positions, (pad, 0)) for entry, pad in zip(entries, missing, strict=True)
        ]
        device = layer_devices[0]
        self.prefix_positions = torch.stack(positions).to(device)
        self.prefix_mask = (torch.arange(slots) >= torch.tensor(missing)[:, None]).to(device)
        self.next_position = torch.tensor([entry.next_position for entry in entries], device=device)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for name in ("prefix_mask", "prefix_positions", "next_position"):
            setattr(self, name, getattr(self, name).repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for name in ("prefix_mask", "prefix_positions", "next_position"):
            setattr(self, name, getattr(self, name)[indices])

    def check_continuation(
        self, length: int, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Raise ``ValueError`` unless the next ``length`` tokens continue this cache exactly.

        In a decoding step (one token on a cache that has grown), only sizes are checked: checking values
        would cost a host sync per token, and they follow from those of the prefill.
        """
        batch, slots = self.prefix_mask.shape
        held = self.get_seq_length()
        wide_enough = attention_mask is None or attention_mask.shape[-1] == held + length
        if held < slots or (held > slots and (length > 1 or not wide_enough)):
            raise ValueError(
                f"expected the compact cache as it was built, with {slots} VoCo slots, got one "
                f"with {held}; a cache grown by generate can't take a new question, nor several new "
                "tokens at once (prompt lookup, an assistant): "
                f"crop(-{max(held - slots, 0)}) it, or call voco_model.generate, which builds a "
                "fresh one from the same entries"
            )
        if held > slots:
            return
        shape = (batch, slots + length)
        if attention_mask is None:
            attention_mask = F.pad(torch.ones_like(self.prefix_mask), (0, length), value=True)
        if attention_mask.shape != shape or not torch.equal(
            attention_mask[:, :slots] != 0, self.prefix_mask
        ):
            raise ValueError(
                f"expected an attention_mask of shape {list(shape)} for {slots} VoCo slots and "
                f"{length} new tokens, starting with the cache's prefix_mask, got "
                f"{list(attention_mask.shape)}; use voco_model.generate"
            )
        text = attention_mask[:, slots:] != 0
        expected = self.next_position[:, None] + text.cumsum(1) - 1
        if position_ids is None or (position_ids.expand_as(expected) != expected)[text].any():
            got = "none" if position_ids is None else str(position_ids[0].tolist())
            raise ValueError(
                "expected position_ids that continue after the first pass, for row 0 "
                f"{expected[0].tolist()}, got {got}; without them the text takes the image's "
                "positions. Use voco_model.generate, which passes them"
            )
