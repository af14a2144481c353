"""A layout in words, and the kinds of tokens that its mask lets one tell apart."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from voco_kernels.layout.scans import last_index_where
from voco_kernels.layout.spans import Span

if TYPE_CHECKING:
    from voco_kernels.layout.layout import MaskLayout

TOKEN_KINDS = ("padding", "vision", "voco", "text")
PADDING, VISION, VOCO, TEXT = range(4)

_SHOWN_GROUPS = 6
_NAMES = {"voco": "VoCo"}


def token_kinds(layout: MaskLayout, row: int) -> tuple[Tensor, Tensor]:
    """Read off the mask what each token of a row is.

    Vision tokens that nothing behind them is kept from seeing (a document that ends with its VoCo
    tokens) can't be told from text, nor can their VoCo tokens: there the mask is plain causal.

    Returns:
        kinds, indices into ``TOKEN_KINDS``, and where the document of each token stops (0 for
        padding); int64 ``[S]`` on the CPU.
    """
    visible_from, visible_until = (
        tensor[row].long().cpu() for tensor in (layout.visible_from, layout.visible_until)
    )
    position = torch.arange(layout.length)
    real = visible_from <= position
    document_stop = torch.where(real, visible_until[(visible_until - 1).clamp(min=0)], 0)
    hidden = real & (visible_until < document_stop)
    last_hidden = last_index_where(hidden[None])[0]
    in_its_segment = position < visible_until[last_hidden.clamp(min=0)]
    kinds = torch.where(real, TEXT, PADDING)
    kinds[real & (last_hidden >= 0) & in_its_segment] = VOCO
    kinds[hidden] = VISION
    return kinds, document_stop


def row_documents(layout: MaskLayout, row: int) -> list[list[Span]]:
    """The spans of a row's documents, without padding: what ``MaskLayout.packed`` takes."""
    kinds, document_stop = token_kinds(layout, row)
    documents = []
    for stop, tokens in groupby(
        zip(document_stop.tolist(), kinds.tolist(), strict=True), lambda token: token[0]
    ):
        if stop:
            runs = groupby(kind for _, kind in tokens)
            documents.append([(TOKEN_KINDS[kind], len(list(run))) for kind, run in runs])
    return documents


def describe_row(layout: MaskLayout, row: int) -> str:
    """``vision 576 | VoCo 1 | text 114``, or the like for several documents."""
    documents = row_documents(layout, row)
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


def describe_layout(layout: MaskLayout) -> str:
    """One line: size, device, the rows' spans, and the visible pairs. A host sync on CUDA."""
    position = torch.arange(layout.length, device=layout.device)
    lengths = (layout.visible_from <= position).sum(1).tolist()
    equal_rows = all(
        bool((tensor == tensor[:1]).all()) for tensor in (layout.visible_from, layout.visible_until)
    )
    spans, per_row, rows = describe_row(layout, 0), "", layout.batch
    if equal_rows:
        per_row, rows = " a row" if layout.batch > 1 else "", 1
    else:
        spans = f"rows of {_range(lengths)} tokens, the first: {spans}"
    isolated = any(_isolates(layout, row) for row in range(rows))
    pairs = layout.pairs() * rows // layout.batch
    causal = sum(n * (n + 1) // 2 for n in lengths[:rows])
    share = f", {pairs / causal:.1%} of causal" if causal else ""
    return (
        f"MaskLayout(batch={layout.batch}, length={layout.length}, {layout.device}: {spans}"
        f"{', isolated' if isolated else ''}; {pairs:,} pairs{per_row}{share})"
    )


def _isolates(layout: MaskLayout, row: int) -> bool:
    """Whether two neighbours of one document see it from different starts."""
    _, document_stop = token_kinds(layout, row)
    starts = layout.visible_from[row].cpu()
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
    """``64 x (vision 576 | VoCo 1)`` where up to three spans come again and again."""
    groups, index = [], 0
    while index < len(spans):
        period, times = 1, 1
        for length in (2, 3):
            unit, count = spans[index : index + length], 1
            while spans[index + count * length : index + (count + 1) * length] == unit:
                count += 1
            if count > 1 and count * length > period * times:
                period, times = length, count
        unit = " | ".join(
            f"{_NAMES.get(kind, kind)} {length}" for kind, length in spans[index : index + period]
        )
        groups.append(f"{times} x ({unit})" if times > 1 else unit)
        index += period * times
    return groups


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
