"""The mask computed token by token from its definition, sharing no code with the package.

token           sees from                           is seen until
vision (query)  start of its document (or segment)  vision (key): its segment's last VoCo token
VoCo (query)    start of its document (or segment)  VoCo, text (keys): the end of its document
text (query)    start of its document
padding         nothing                             never
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.voco_kernels.cases import Document


@dataclass
class Token:
    kind: str
    document: int
    segment: int | None = None  # a number no other segment of the row has


def tokens_of(documents: list[Document]) -> list[Token]:
    """The tokens of a row. Vision tokens and the VoCo tokens directly after them form a segment; other
    vision tokens become text."""
    tokens = []
    for number, document in enumerate(documents):
        tokens += [Token(kind, number) for kind, length in document for _ in range(length)]
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else None
        if token.kind == "voco":
            assert before is not None and before.document == token.document
            if before.kind == "voco":
                token.segment = before.segment
                continue
            start = index
            while (
                start > 0
                and tokens[start - 1].kind == "vision"
                and tokens[start - 1].document == token.document
            ):
                start -= 1
            for member in tokens[start : index + 1]:
                member.segment = index
    for token in tokens:
        if token.kind == "vision" and token.segment is None:
            token.kind = "text"
    return tokens


def sees(tokens: list[Token], query: int, key: int, isolated: bool) -> bool:
    i, j = tokens[query], tokens[key]
    if "padding" in (i.kind, j.kind) or key > query or i.document != j.document:
        return False
    same_segment = i.segment is not None and i.segment == j.segment
    if isolated and i.segment is not None and not same_segment:
        return False
    return j.kind != "vision" or same_segment


def mask_of_tokens(rows: list[list[Token]], isolated: bool = False) -> Tensor:
    """The mask of rows of equal length, bool ``[B, S, S]``."""
    return torch.tensor(
        [
            [[sees(row, i, j, isolated) for j in range(len(row))] for i in range(len(row))]
            for row in rows
        ]
    )


def brute_force_mask(
    rows: list[list[Document]], *, isolated: bool = False, padding_side: str = "right"
) -> Tensor:
    """The mask of padded rows of documents, bool ``[B, S, S]``: whether query ``i`` sees key ``j``."""
    tokens = [tokens_of(documents) for documents in rows]
    longest = max(map(len, tokens))
    padded = []
    for row in tokens:
        padding = [Token("padding", -1)] * (longest - len(row))
        padded.append(padding + row if padding_side == "left" else row + padding)
    return mask_of_tokens(padded, isolated)
