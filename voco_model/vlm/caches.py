"""Key/value caches of the two passes, in the form that models and ``generate`` take."""

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

# What models and ``generate`` call a cache: past_key_values, before Transformers 5.24 renamed it.
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(LlavaModel.forward).parameters else "past_key_values"
)


class VoCoCollector(DynamicCache):
    """The cache of pass 1: hands every key to the layer that made it, keeps only the VoCo tokens'.

    So a batch of images never holds more than one layer's full keys and values, 1/32 of what a
    full cache takes in LLaVA-1.5-7B.

    Args:
        columns: int64 ``[B, n]``, which columns of the batch to keep.
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
    """The cache that pass 2 starts from: the VoCo tokens of one image a row, and what must follow.

    Its tensors are copies: no entry changes when the cache grows. Entries with fewer tokens than
    the longest are padded on the left, with ``prefix_mask`` False there.

    Args:
        entries: one a row; same layers, heads and head_dim.
        layer_devices: where each layer's keys and values go.
        dtype: of the model.

    Attributes:
        prefix_mask: bool ``[B, n]``.
        prefix_positions: int64 ``[B, n]``, 0 in padding.
        next_position: int64 ``[B]``.
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
        """Raise ``ValueError`` if the ``length`` tokens about to be read can't follow exactly.

        Of a decoding step (one token on a cache that has grown) only sizes are looked at: values
        would cost a host sync a token, and they follow from those of the prefill.
        """
        batch, slots = self.prefix_mask.shape
        held = self.get_seq_length()
        wide_enough = attention_mask is None or attention_mask.shape[-1] == held + length
        if held < slots or (held > slots and (length > 1 or not wide_enough)):
            raise ValueError(
                f"expected the compact cache as it was built, with {slots} VoCo slots, got one "
                f"with {held}; a cache that generate has grown can't take a new question, nor "
                "several new tokens at once (prompt lookup, an assistant): "
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
                f"{length} new tokens, with the cache's prefix_mask in front, got "
                f"{list(attention_mask.shape)}; use voco_model.generate"
            )
        text = attention_mask[:, slots:] != 0
        expected = self.next_position[:, None] + text.cumsum(1) - 1
        if position_ids is None or (position_ids.expand_as(expected) != expected)[text].any():
            got = "none" if position_ids is None else str(position_ids[0].tolist())
            raise ValueError(
                "expected position_ids that go on where the first pass stopped, for row 0 "
                f"{expected[0].tolist()}, got {got}; without them the text stands in the image's "
                "place. Use voco_model.generate, which passes them"
            )
