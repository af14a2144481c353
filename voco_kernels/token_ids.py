"""From token ids to the two visibility vectors, on the ids' device and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels.scans import last_index_where, next_index_where, shift_right


def visibility_from_token_ids(
    input_ids: Tensor,
    voco_token_id: int,
    image_token_id: int | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    isolated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visible_from``, ``visible_until`` (int64 ``[B, S]``; semantics: ``MaskLayout.from_input_ids``),
    and which VoCo tokens have no context to compress (bool ``[B, S]``), which here count as text.

    Static shapes and tensor operations only, so legal inside ``torch.compile`` and graph capture.
    """
    length = input_ids.shape[1]
    position = torch.arange(length, device=input_ids.device).expand(input_ids.shape)
    real, starts_document = _documents(input_ids, attention_mask, position_ids)
    is_voco = real & (input_ids == voco_token_id)

    document_start = last_index_where(starts_document)
    next_padding = next_index_where(~real)
    document_stop = torch.minimum(_next_after(starts_document), next_padding)

    # A token belongs to a segment's context if a VoCo token follows it in its document ...
    next_voco = next_index_where(is_voco)
    previous_voco = shift_right(last_index_where(is_voco), -1)
    first_in_document = previous_voco < document_start
    context = real & ~is_voco & (next_voco < document_stop)
    if image_token_id is not None:
        # ... and, after the document's first segment, an image token stands at or before it.
        last_image = last_index_where(real & (input_ids == image_token_id))
        context = context & (first_in_document | (last_image > previous_voco))
    starts_run = is_voco & (~shift_right(is_voco, False) | starts_document)
    run_start = last_index_where(starts_run).clamp(min=0)
    in_segment = is_voco & shift_right(context, False).gather(1, run_start)

    # A context token is seen until its VoCo run stops: the first token behind next_voco that is none.
    run_stop = torch.minimum(next_index_where(~is_voco), document_stop)
    segment_stop = run_stop.gather(1, next_voco.clamp(max=length - 1))
    visible_until = torch.where(context, segment_stop, document_stop)
    visible_from = document_start
    if isolated:
        starts_segment = context & (~shift_right(context, False) | starts_document)
        segment_start = last_index_where(starts_segment)
        visible_from = torch.where(context | in_segment, segment_start, document_start)
    visible_from = torch.where(real, visible_from, length)
    return visible_from, torch.where(real, visible_until, 0), is_voco & ~in_segment


def check_padding(attention_mask: Tensor) -> None:
    """Raise ``ValueError`` unless each row's real tokens stand together. Reads the values."""
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
            f"token {voco_token_id} at position {position} of row {row} with none before it; put the "
            "image in front of it, or check voco_token_id and image_token_id"
        )


def _documents(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which tokens are real, and at which of them a document starts; bool ``[B, S]`` both."""
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
    starts = real & ~shift_right(real, False)
    if position_ids is not None:
        starts = starts | (real & (position_ids == 0))
    return real, starts


def _next_after(flags: Tensor) -> Tensor:
    """The smallest index > i where the flag is set; S where there is none."""
    length = flags.shape[1]
    following = torch.cat([flags[:, 1:], torch.ones_like(flags[:, :1])], dim=1)
    return (next_index_where(following) + 1).clamp(max=length)


def _shorten(positions: list[int]) -> str:
    return str(positions) if len(positions) <= 8 else f"{str(positions[:8])[:-1]}, ...]"
