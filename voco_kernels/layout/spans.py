"""Conversion of (kind, length) spans to ``visible_from`` and ``visible_until``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from voco_kernels.integers import is_integer
from voco_kernels.layout.schedule import MOST_TOKENS

Span = tuple[str, int]
KINDS = ("vision", "voco", "text")


def visibility_from_documents(
    rows: Sequence[Sequence[Sequence[Span]]], *, isolated: bool, padding_side: str
) -> tuple[Tensor, Tensor]:
    """``visible_from`` and ``visible_until``, int64 ``[B, S]`` on the CPU; S is the longest row.

    Args:
        rows: for each row, its documents; for each document, its spans.

    Raises:
        ValueError: see ``MaskLayout.from_spans``.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"expected padding_side 'left' or 'right', got {padding_side!r}")
    if not rows:
        raise ValueError("expected at least one row of spans, got none")
    merged = [
        [_merge(document, f"row {r}, document {d}") for d, document in enumerate(documents)]
        for r, documents in enumerate(rows)
    ]
    lengths = [sum(length for document in row for _, length in document) for row in merged]
    if min(lengths) == 0:
        raise ValueError(
            f"expected at least one token in each row, got none in row {lengths.index(0)}"
        )
    longest = max(lengths)
    check_size(len(rows), longest)
    visible_from = torch.full((len(rows), longest), longest)
    visible_until = torch.zeros(len(rows), longest, dtype=torch.int64)
    for r, documents in enumerate(merged):
        start = longest - lengths[r] if padding_side == "left" else 0
        for document in documents:
            start = _fill(visible_from[r], visible_until[r], document, start, isolated)
    return visible_from, visible_until


def check_size(batch: int, length: int) -> None:
    """Raise ``ValueError`` if there are more tokens than a layout can have."""
    if batch * length > MOST_TOKENS:
        raise ValueError(
            f"expected at most {MOST_TOKENS} tokens in a batch, padding included, got {batch} rows of "
            f"{length}; a layout's positions are int32: split the batch"
        )


def _merge(document: Sequence[Span], where: str) -> list[Span]:
    """Check a document's spans, drop empty ones and join adjacent ones of the same kind."""
    merged: list[Span] = []
    for span in document:
        if isinstance(span, str) or len(span) != 2:
            raise ValueError(
                f"expected (kind, length) spans, got {span!r} in {where}; pass a list of rows, each "
                "a list of spans (packed: a list of documents)"
            )
        kind, length = span
        if kind not in KINDS:
            raise ValueError(f"expected a kind among {KINDS}, got {kind!r} in {where}")
        if not is_integer(length) or length < 0:
            raise ValueError(
                f"expected a length >= 0 for the {kind} span of {where}, got {length!r}"
            )
        length = int(length)
        if length == 0:
            continue
        if kind == "voco" and (not merged or merged[-1][0] == "text"):
            before = "nothing" if not merged else "text"
            raise ValueError(
                f"expected VoCo tokens directly after the vision tokens they compress, got {length} "
                f"VoCo tokens after {before} in {where}; put a ('vision', n) span before them"
            )
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + length)
        else:
            merged.append((kind, length))
    return merged


def _fill(
    visible_from: Tensor, visible_until: Tensor, document: list[Span], start: int, isolated: bool
) -> int:
    """Write a document that begins at ``start`` into a row; return where it stops."""
    stop = start + sum(length for _, length in document)
    visible_from[start:stop] = start
    visible_until[start:stop] = stop
    position = start
    for index, (kind, length) in enumerate(document):
        following = document[index + 1] if index + 1 < len(document) else ("text", 0)
        if kind == "vision" and following[0] == "voco":
            segment_stop = position + length + following[1]
            visible_until[position : position + length] = segment_stop
            if isolated:
                visible_from[position:segment_stop] = position
        position += length
    return stop
