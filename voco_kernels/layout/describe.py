"""Text descriptions of layouts, and token kinds recovered from a mask.

A row's mask is given as its ``visible_from`` and ``visible_until``, integers ``[S]``.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from voco_kernels.layout.scans import last_index_where
from voco_kernels.layout.spans import Span

TOKEN_KINDS = ("padding", "vision", "voco", "text")
PADDING, VISION, VOCO, TEXT = range(4)

_SHOWN_GROUPS = 6
_NAMES = {"voco": "VoCo"}


def token_kinds(visible_from: Tensor, visible_until: Tensor) -> tuple[Tensor, Tensor]:
    """Infer the kind of each token from a row's mask.

    In a document that ends with its VoCo tokens, every later token may see the vision tokens. The mask
    is plain causal there, so those vision and VoCo tokens count as text.

    Returns:
        Two int64 tensors ``[S]`` on the CPU: each token's kind, an index into ``TOKEN_KINDS``, and the
        position where its document stops (0 for padding).
    """
    visible_from, visible_until = visible_from.long().cpu(), visible_until.long().cpu()
    position = torch.arange(len(visible_from))
    real = visible_from <= position
    document_stop = torch.where(real, visible_until[(visible_until - 1).clamp(min=0)], 0)
    hidden = real & (visible_until < document_stop)
    last_hidden = last_index_where(hidden[None])[0]
    in_its_segment = position < visible_until[last_hidden.clamp(min=0)]
    kinds = torch.where(real, TEXT, PADDING)
    kinds[real & (last_hidden >= 0) & in_its_segment] = VOCO
    kinds[hidden] = VISION
    return kinds, document_stop


def row_documents(visible_from: Tensor, visible_until: Tensor) -> list[list[Span]]:
    """The spans of a row's documents, without padding, as ``MaskLayout.packed`` takes them."""
    kinds, document_stop = token_kinds(visible_from, visible_until)
    documents = []
    for stop, tokens in groupby(
        zip(document_stop.tolist(), kinds.tolist(), strict=True), lambda token: token[0]
    ):
        if stop:
            runs = groupby(kind for _, kind in tokens)
            documents.append([(TOKEN_KINDS[kind], len(list(run))) for kind, run in runs])
    return documents


def describe_row(visible_from: Tensor, visible_until: Tensor) -> str:
    """Describe a row, e.g. ``vision 576 | VoCo 1 | text 114``; several documents are summarized."""
    documents = row_documents(visible_from, visible_until)
    if not documents:
        return "padding only"
    first = _describe_document(documents[0])
    if len(documents) == 1:
        return first
    if all(document == documents[0] for document in documents):
        return f"{len(documents)} documents of {first}"
    lengths = [sum(length for _, length in document) for document in documents]
    return (
        f"{len(documents)} documents of {_range(lengths)} tokens, the first: {first}, "
        f"the last: {_describe_document(documents[-1])}"
    )


def describe_layout(visible_from: Tensor, visible_until: Tensor, pairs: int) -> str:
    """Describe a layout in one line: size, device, spans and visible pairs. A host sync on CUDA.

    Args:
        visible_from, visible_until: the layout's tensors, ``[B, S]``.
        pairs: number of visible (query, key) pairs in the whole batch.
    """
    batch, length = visible_from.shape
    position = torch.arange(length, device=visible_from.device)
    lengths = (visible_from <= position).sum(1).tolist()
    equal_rows = all(bool((each == each[:1]).all()) for each in (visible_from, visible_until))
    spans, per_row, rows = describe_row(visible_from[0], visible_until[0]), "", batch
    if equal_rows:
        per_row, rows = " a row" if batch > 1 else "", 1
    else:
        spans = f"rows of {_range(lengths)} tokens, the first: {spans}"
    isolated = any(_isolates(visible_from[row], visible_until[row]) for row in range(rows))
    pairs = pairs * rows // batch
    causal = sum(n * (n + 1) // 2 for n in lengths[:rows])
    share = f", {pairs / causal:.1%} of causal" if causal else ""
    return (
        f"MaskLayout(batch={batch}, length={length}, {visible_from.device}: {spans}"
        f"{', isolated' if isolated else ''}; {pairs:,} pairs{per_row}{share})"
    )


def _isolates(visible_from: Tensor, visible_until: Tensor) -> bool:
    """Whether adjacent tokens of one document differ in the first key that they may see."""
    _, document_stop = token_kinds(visible_from, visible_until)
    starts = visible_from.cpu()
    same_document = (document_stop[1:] == document_stop[:-1]) & (document_stop[1:] > 0)
    return bool((same_document & (starts[1:] != starts[:-1])).any())


def _describe_document(spans: list[Span]) -> str:
    if len(spans) == 1 and spans[0][0] == "text":
        return f"causal {spans[0][1]}"
    groups = _group_repeats(spans)
    if len(groups) > _SHOWN_GROUPS:
        left_out = len(groups) - _SHOWN_GROUPS + 1
        groups[_SHOWN_GROUPS - 2 : -1] = [f"... {left_out} more ..."]
    return " | ".join(groups)


def _group_repeats(spans: list[Span]) -> list[str]:
    """``64 x (vision 576 | VoCo 1)`` where up to three spans repeat."""
    groups, index = [], 0
    while index < len(spans):
        period, times = 1, 1
        for length in (2, 3):
            unit, count = spans[index : index + length], 1
            while spans[index + count * length : index + (count + 1) * length] == unit:
                count += 1
            if count > 1 and count * length > period * times:
                period, times = length, count
        shown = " | ".join(
            f"{_NAMES.get(kind, kind)} {length}" for kind, length in spans[index : index + period]
        )
        groups.append(f"{times} x ({shown})" if times > 1 else shown)
        index += period * times
    return groups


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
