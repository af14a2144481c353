"""Document boundaries in packed rows, from any of the four markers that collators use.

============================  =================================================================
``position_ids [B, S]``       a document starts wherever they don't increase by 1
``attention_mask [B, S]``     integers that number the documents of a row (1 1 2 2 2 0)
``sequence_ids [B, S]``       a document starts wherever they change (Transformers' ``seq_idx``)
``cu_seqlens [documents + 1]``  cumulative lengths over the ``B * S`` tokens, row after row
============================  =================================================================

If several are given, they must agree. In eager mode on the CPU a disagreement raises ``ValueError``; on
an accelerator and under ``torch.compile`` it fails an assertion on the device, without a host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from voco_kernels.layout.scans import last_index_where, shift_right


def starts_of_documents(
    real: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """bool ``[B, S]``: True where either marker starts a document; ``real`` is False for padding."""
    starts = real & ~shift_right(real, False)
    if attention_mask is not None:
        starts = starts | _changes(attention_mask, real)
    if position_ids is not None:
        starts = starts | _restarts(position_ids, real)
    return starts


def document_positions(
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """int64 ``[B, S]``: each token's position in its document, from 0; unspecified for padding.

    Args:
        input_ids: ``[B, S]``; only its shape and device are used.
        attention_mask, position_ids, sequence_ids, cu_seqlens: integers on that device, as in
            ``MaskLayout.from_input_ids``; a bool attention_mask marks padding only, no documents.

    Raises:
        TypeError: a marker isn't an integer tensor.
        ValueError: a marker has the wrong shape or device. On the CPU, outside ``torch.compile``, also
            if markers disagree, cu_seqlens don't cover the tokens, or document numbers decrease.
    """
    check_markers(input_ids, attention_mask, position_ids, sequence_ids, cu_seqlens)
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
    first = real & ~shift_right(real, False)
    starts: dict[str, Tensor] = {}
    if cu_seqlens is not None:
        starts["cu_seqlens"] = first | (real & _starts_of_lengths(cu_seqlens, real))
    if sequence_ids is not None:
        starts["sequence_ids"] = first | _changes(sequence_ids, real)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        starts["attention_mask"] = first | _changes(attention_mask, real)
    if position_ids is not None:
        starts["position_ids"] = first | _restarts(position_ids, real)
    if _may_read_values(input_ids):
        if cu_seqlens is not None:
            _check_cover(cu_seqlens, real)
        if attention_mask is not None:
            _check_growing(attention_mask)
            if not bool((attention_mask > 1).any()):
                starts.pop("attention_mask", None)  # only 0 and 1: a padding mask
        _check_agreement(starts)
    else:
        _assert_on_device(starts, attention_mask, cu_seqlens, real)
    together = first
    for by_marker in starts.values():
        together = together | by_marker
    place = torch.arange(real.shape[1], device=real.device)
    return place - last_index_where(together)


def check_markers(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise if a marker has the wrong type, shape or device. Doesn't read the values."""
    rows = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "sequence_ids": sequence_ids,
    }
    for name, tensor in (*rows.items(), ("cu_seqlens", cu_seqlens)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} as a tensor, got {type(tensor).__name__}")
        if tensor.device != input_ids.device or (name in rows and tensor.shape != input_ids.shape):
            shape = f" of shape {list(input_ids.shape)}" if name in rows else ""
            raise ValueError(
                f"expected {name}{shape} on {input_ids.device} like input_ids, got "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        kind = "a bool or integer" if name == "attention_mask" else "an integer"
        if tensor.dtype.is_floating_point or (
            tensor.dtype == torch.bool and name != "attention_mask"
        ):
            advice = "; pass attention_mask != 0 if 0 is padding" if "bool" in kind else ""
            raise TypeError(f"expected {kind} {name}, got {tensor.dtype}{advice}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 2):
        raise ValueError(
            "expected cu_seqlens [documents + 1], the cumulative lengths from 0, got "
            f"{list(cu_seqlens.shape)}"
        )


def check_numbered_documents(attention_mask: Tensor, position_ids: Tensor | None) -> None:
    """Raise ``ValueError`` if an attention_mask's document numbers decrease along a row or disagree
    with position_ids. Reads the values."""
    if attention_mask.dtype == torch.bool:
        return
    if not bool(((attention_mask > 1) | (attention_mask < 0)).any()):
        return
    _check_growing(attention_mask)
    if position_ids is not None:
        real = attention_mask != 0
        first = real & ~shift_right(real, False)
        _check_agreement(
            {
                "attention_mask": first | _changes(attention_mask, real),
                "position_ids": first | _restarts(position_ids, real),
            }
        )


def _changes(numbers: Tensor, real: Tensor) -> Tensor:
    """Real tokens whose number differs from that of the token before."""
    return real & (numbers != shift_right(numbers, 0))


def _restarts(position_ids: Tensor, real: Tensor) -> Tensor:
    """Real tokens whose position isn't one more than that of the token before."""
    return real & (position_ids != shift_right(position_ids, -1) + 1)


def _starts_of_lengths(cu_seqlens: Tensor, real: Tensor) -> Tensor:
    # Clamped so that a wrong value can't write out of bounds; the checks report it.
    index = cu_seqlens.long().clamp(0, real.numel())
    flags = torch.zeros(real.numel() + 1, dtype=torch.bool, device=real.device)
    return flags.index_fill(0, index, True)[:-1].view_as(real)


def _covers(cu_seqlens: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The conditions that cumulative lengths must meet, each with a bool scalar tensor."""
    batch, length = real.shape
    last = cu_seqlens[-1]
    behind = torch.arange(real.numel(), device=real.device) >= last
    row_starts = torch.arange(batch, device=real.device) * length
    return {
        "starting at 0": cu_seqlens[0] == 0,
        "never decreasing": (cu_seqlens[1:] >= cu_seqlens[:-1]).all(),
        f"up to the {real.numel()} tokens of the batch (or fewer, if only padding follows)": (
            last <= real.numel()
        )
        & ~(behind & real.flatten()).any(),
        "with a document starting in each row": torch.isin(row_starts, cu_seqlens).all(),
    }


def _check_cover(cu_seqlens: Tensor, real: Tensor) -> None:
    for condition, holds in _covers(cu_seqlens, real).items():
        if not bool(holds):
            raise ValueError(
                f"expected cu_seqlens {condition}, got {_shorten(cu_seqlens.tolist())} for rows of "
                f"shape {list(real.shape)}; they count the tokens of input_ids, image tokens and "
                "padding between rows included"
            )


def _check_growing(attention_mask: Tensor) -> None:
    if attention_mask.dtype == torch.bool:
        return
    if bool((attention_mask < 0).any()):
        raise ValueError(
            "expected an attention_mask with 0 for padding and, for each token, 1 or its document's "
            f"number, got {int(attention_mask.min())}; pass attention_mask != 0 if 0 is padding"
        )
    real = attention_mask != 0
    highest = attention_mask.cummax(1).values
    back = real & (attention_mask < highest)
    if bool(back.any()):
        row, position = back.nonzero()[0].tolist()
        raise ValueError(
            "expected the document numbers in attention_mask to increase along a row, got "
            f"{int(attention_mask[row, position])} after {int(highest[row, position])} at position "
            f"{position} of row {row}; give each document a number of its own"
        )


def _check_agreement(starts: dict[str, Tensor]) -> None:
    (one, of_one), *others = starts.items()
    for other, of_other in others:
        differ = of_one != of_other
        if bool(differ.any()):
            row, position = differ.nonzero()[0].tolist()
            has, lacks = (one, other) if bool(of_one[row, position]) else (other, one)
            raise ValueError(
                f"expected {one} and {other} to agree on where documents start, got a start at "
                f"position {position} of row {row} in {has} but not in {lacks}; pass only one of "
                "them, or correct the other"
            )


def _assert_on_device(
    starts: dict[str, Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    real: Tensor,
) -> None:
    """Make the same checks where the host can't read values, as assertions on the device."""
    if cu_seqlens is not None:
        for condition, holds in _covers(cu_seqlens, real).items():
            torch._assert_async(holds, f"expected cu_seqlens {condition}")
    numbered = None
    if attention_mask is not None and "attention_mask" in starts:
        numbered = torch.gt(attention_mask, 1).any()
        back = real & (attention_mask < attention_mask.cummax(1).values)
        torch._assert_async(
            ~back.any(), "expected the document numbers in attention_mask to increase along a row"
        )
    (one, of_one), *others = starts.items()
    for other, of_other in others:
        agree = (of_one == of_other).all()
        if numbered is not None and "attention_mask" in (one, other):
            agree = agree | ~numbered
        torch._assert_async(agree, f"expected {one} and {other} to agree on where documents start")


def _may_read_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
