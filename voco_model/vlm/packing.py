"""Markers of packed documents in an enabled model's keyword arguments.

Besides restarting position_ids and document numbers in attention_mask, these are ``cu_seq_lens_q``,
``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` (FlashAttention's) and ``seq_idx`` of
``transformers.DataCollatorWithFlattening``.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaModel, LlavaNextModel
from transformers.cache_utils import Cache

_CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_NUMBERS = "seq_idx"
# Names in other trainers. A model would ignore them, and the documents would see each other.
_UNREAD = (
    "block_mask",
    "cu_seq_lens",
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_padded",
    "doc_ids",
    "document_id",
    "document_ids",
    "packed_seq_params",
    "segment_ids",
    "seq_lengths",
    "seqlens",
    "sequence_ids",
    "text_position_ids",
)
_READ = (
    "position_ids that restart, attention_mask with numbers (1, 1, 2, 2, 2), cu_seq_lens_q or "
    "seq_idx"
)


# Read before the code is compiled: the parameters of the models' forward, and other known arguments.
_NO_MARKERS = {
    *signature(LlavaModel.forward).parameters,
    *signature(LlavaNextModel.forward).parameters,
    "cache_position",
    "labels",
    "logits_to_keep",
    "mm_token_type_ids",
    "num_items_in_batch",
    "shift_labels",
    "token_type_ids",
}


def take_markers(kwargs: dict) -> dict[str, Tensor]:
    """Remove the markers from ``kwargs``.

    Returns:
        those present, under their names in ``MaskLayout.from_input_ids``: ``sequence_ids``,
        ``cu_seqlens``.

    Raises:
        TypeError: a marker that isn't a tensor.
        ValueError: an unsupported name; different cu_seq_lens_q and cu_seq_lens_k; a max_length without
            them, or below a document's length.
    """
    read = (*_CUMULATIVE, *_LONGEST, _NUMBERS)
    unread = [
        name
        for name, value in kwargs.items()
        if name not in read and value is not None and (name in _UNREAD or _may_mark(name, value))
    ]
    if unread:
        raise ValueError(
            f"expected packed documents marked by {_READ}, got {', '.join(unread)}, which is not read; "
            "pass one of these instead"
        )
    cumulative = _given(kwargs, _CUMULATIVE)
    longest = _given(kwargs, _LONGEST)
    markers = {}
    if cumulative:
        (name, lengths), *others = cumulative.items()
        for other, values in others:
            _check_equal(name, lengths, other, values)
        for other, length in longest.items():
            _check_longest(name, lengths, other, length)
        markers["cu_seqlens"] = lengths
    elif longest:
        raise ValueError(
            f"expected cu_seq_lens_q with {', '.join(longest)}, got none; a maximum length alone "
            "doesn't say where documents start"
        )
    numbers = kwargs.pop(_NUMBERS, None)
    if numbers is not None:
        markers["sequence_ids"] = numbers
    return markers


def refuse_markers(cache: Cache, length: int, kwargs: dict) -> None:
    """Raise ``ValueError`` for documents packed into tokens that follow a cache.

    For a single token, nothing is read from the device.
    """
    names = (*_CUMULATIVE, *_LONGEST, _NUMBERS, *_UNREAD)
    found = [name for name in names if kwargs.get(name) is not None]
    if length > 1 and not torch.compiler.is_compiling():
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        plain = isinstance(mask, Tensor) and mask.dim() == 2
        if plain and bool((mask > 1).any()):
            found.append("attention_mask with numbers above 1")
        if position_ids is not None and position_ids.dim() == 2:
            goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
            if plain:  # padding may have any position
                real = mask[:, -length:] != 0
                goes_on = goes_on | ~(real[:, 1:] & real[:, :-1])
            if not bool(goes_on.all()):
                found.append("position_ids that don't increase by 1")
    if found:
        raise ValueError(
            f"expected tokens of one document to follow a cache of {int(cache.get_seq_length())}, got "
            f"{', '.join(found)}; documents can only be packed without a cache: leave that out, or pass "
            "use_cache=False and no cache"
        )


def _may_mark(name: str, value: Any) -> bool:
    """Whether an argument with an unknown name could hold document numbers or lengths."""
    if name in _NO_MARKERS or not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _given(kwargs: dict, names: tuple[str, ...]) -> dict:
    taken = {name: kwargs.pop(name, None) for name in names}
    return {name: value for name, value in taken.items() if value is not None}


def _check_equal(name: str, lengths: Tensor, other: str, values: Tensor) -> None:
    for which, tensor in ((name, lengths), (other, values)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {which} as a tensor, got {type(tensor).__name__}")
    message = f"expected {name} and {other} to be equal"
    shapes = lengths.shape == values.shape and lengths.device == values.device
    if not shapes or (_readable(lengths) and not torch.equal(lengths, values)):
        raise ValueError(
            f"{message}, got {_shown(lengths)} and {_shown(values)}; queries and keys are "
            "the same tokens"
        )
    if not _readable(lengths) and values is not lengths:
        torch._assert_async((lengths == values).all(), message)


def _check_longest(name: str, lengths: Tensor, other: str, length: int | Tensor) -> None:
    """Checked only if that needs no host sync: nothing here depends on it."""
    if not isinstance(lengths, Tensor) or not _readable(lengths) or len(lengths) < 2:
        return
    longest = int(lengths.diff().max())
    if not isinstance(length, Tensor) and length < longest:
        raise ValueError(
            f"expected {other} of at least {longest}, the longest document of {name}, got {length}"
        )


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shown(tensor: Tensor) -> str:
    if not _readable(tensor) or tensor.numel() > 8:
        return f"{list(tensor.shape)} on {tensor.device}"
    return str(tensor.tolist())
