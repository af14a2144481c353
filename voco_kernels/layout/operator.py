"""The operator ``voco_kernels::layout_from_token_ids``, which builds a ``MaskLayout``'s tensors.

It is one operator so that ``torch.compile`` and graph capture see one node and no Python state.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from voco_kernels.layout.schedule import TILE_COLUMNS, build_schedule
from voco_kernels.layout.token_ids import visibility_from_token_ids


@torch.library.custom_op("voco_kernels::layout_from_token_ids", mutates_args=())
def layout_from_token_ids(
    input_ids: Tensor,
    voco_token_id: int,
    image_token_id: int | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    isolated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors that ``MaskLayout.from_tensors`` takes, and a mask (bool ``[B, S]``) of the VoCo
    tokens that have no context to compress. Arguments as in ``MaskLayout.from_input_ids``, unchecked.

    The torch code is the specification. On CUDA a few Triton kernels compute the same values (except
    for elements that are unspecified); without Triton, the torch code runs there too. No host sync.
    """
    if input_ids.is_cuda and input_ids.numel() > 0 and _has_triton():
        from voco_kernels.layout import triton as triton_layout

        return triton_layout.layout_from_token_ids(
            input_ids, voco_token_id, image_token_id, attention_mask, position_ids, isolated
        )
    visible_from, visible_until, stray = visibility_from_token_ids(
        input_ids, voco_token_id, image_token_id, attention_mask, position_ids, isolated=isolated
    )
    schedule = build_schedule(visible_from, visible_until)
    # Contiguous for any strides of input_ids, as the fake kernel promises.
    since, until = (rows.int().contiguous() for rows in (visible_from, visible_until))
    query_tiles, key_tiles, counts, kept, readers = schedule
    return since, until, query_tiles, key_tiles, counts, kept, readers, stray.contiguous()


@layout_from_token_ids.register_fake
def _(input_ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = input_ids.shape
    rows = input_ids.new_empty(shape, dtype=torch.int32)
    tiles = input_ids.new_empty(shape.numel(), TILE_COLUMNS, dtype=torch.int32)
    return (
        rows,
        torch.empty_like(rows),
        tiles,
        torch.empty_like(tiles),
        input_ids.new_empty(2, dtype=torch.int32),
        torch.empty_like(rows),
        torch.empty_like(rows),
        torch.empty_like(rows, dtype=torch.bool),
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
