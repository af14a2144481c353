"""Conversion of token ids to ``visible_from`` and ``visible_until``, on device, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels.layout.documents import starts_of_documents
from voco_kernels.layout.scans import last_index_where, next_index_where, shift_left, shift_right


def visibility_from_token_ids(
    input_ids: Tensor,
    voco_token_id: int,
    image_token_id: int | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    isolated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visible_from``, ``visible_until`` (int64 ``[B, S]``; see ``MaskLayout.from_input_ids``), and a
    mask (bool ``[B, S]``) of the VoCo tokens that have no context to compress, which count as text here.

    Uses only tensor operations with static shapes, so it works in ``torch.compile`` and graph capture.
    """
    length = input_ids.shape[1]
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
    starts_document = starts_of_documents(real, attention_mask, position_ids)
    ends_document = real & shift_left(starts_document | ~real, True)
    is_voco = real & (input_ids == voco_token_id)
    ends_run = is_voco & (ends_document | ~shift_left(is_voco, False))

    # A token is context if the next end of a VoCo run is in its document; it is visible until there.
    document_start = last_index_where(starts_document)
    document_stop = next_index_where(ends_document) + 1
    segment_stop = next_index_where(ends_run) + 1
    context = real & ~is_voco & (segment_stop <= document_stop)
    if image_token_id is not None:
        # After the document's first VoCo run, an image token must also precede it, or be it.
        opens = starts_document | (real & (input_ids == image_token_id))
        context = context & (last_index_where(opens) > last_index_where(is_voco))
    before_run = last_index_where(~is_voco | starts_document).clamp(min=0)
    in_segment = is_voco & context.gather(1, before_run)

    visible_until = torch.where(context, segment_stop, document_stop)
    visible_from = document_start
    if isolated:
        starts_segment = context & (~shift_right(context, False) | starts_document)
        segment_start = last_index_where(starts_segment)
        visible_from = torch.where(context | in_segment, segment_start, document_start)
    visible_from = torch.where(real, visible_from, length)
    return visible_from, torch.where(real, visible_until, 0), is_voco & ~in_segment


def check_padding(attention_mask: Tensor) -> None:
    """Raise ``ValueError`` if padding separates a row's real tokens. Reads the values."""
    real = attention_mask != 0
    edges = (real[:, 1:] != real[:, :-1]).sum(1)
    broken = (edges > 2) | ((edges == 2) & real[:, 0])
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        first = int(real[row].long().argmax())
        holes = (~real[row, first:]).nonzero().flatten() + first
        raise ValueError(
            "expected an attention_mask padded on the left or on the right, got zeros inside row "
            f"{row}, at positions {_shorten(holes.tolist())} of {real.shape[1]}; remove the holes"
        )


def check_context(stray: Tensor, voco_token_id: int) -> None:
    """Raise ``ValueError`` if any VoCo token has no context to compress. Reads the values."""
    if bool(stray.any()):
        row, position = stray.nonzero()[0].tolist()
        raise ValueError(
            "expected vision tokens directly before the VoCo tokens that compress them, got VoCo "
            f"token {voco_token_id} at position {position} of row {row} with none before it; put "
            "the image before it, or check voco_token_id and image_token_id"
        )


def _shorten(positions: list[int]) -> str:
    return str(positions) if len(positions) <= 8 else f"{str(positions[:8])[:-1]}, ...]"
