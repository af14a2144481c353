"""How a user of stock causal attention would serve this mask: cut the tokens into pieces that are
plain causal by themselves, attend, and join the results.

A segment ``[vision | VoCo]`` is one piece; the text of a document, with the VoCo tokens before it,
is the other. The VoCo tokens stay in the second piece as queries, so that it is square and causal;
their rows are dropped. That is exact for one image and for isolated segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bench.attention.shapes import Document, Shape

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Tokens of one row that attend causally among themselves.

    Attributes:
        row: of the batch.
        ranges: token positions ``[start, stop)``, in order.
        dropped: how many of the first outputs belong to another piece.
    """

    row: int
    ranges: tuple[Range, ...]
    dropped: int

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def pieces(shape: Shape) -> list[Piece]:
    """All pieces of a shape, document by document: its segments in order, then its text.

    Raises:
        ValueError: the mask is not a set of causal pieces, or not one that these rivals know.
    """
    result: list[Piece] = []
    start = 0
    for index, document in enumerate(shape.documents):
        row = 0 if shape.packed else index
        start = start if shape.packed else 0
        segments, text = _segments_and_text(document, start)
        if len(segments) > 1 and not shape.isolated:
            raise ValueError(
                f"expected isolated segments or one a document, got {len(segments)} segments that "
                f"see each other in document {index} of shape {shape.name}"
            )
        voco_ranges = []
        for vision, voco in segments:
            result.append(Piece(row, ((vision[0], voco[1]),), dropped=0))
            voco_ranges.append(voco)
        dropped = sum(stop - first for first, stop in voco_ranges)
        result.append(Piece(row, _join_neighbours([*voco_ranges, text]), dropped))
        start = text[1]
    return result


def _segments_and_text(document: Document, start: int) -> tuple[list[tuple[Range, Range]], Range]:
    kinds = [kind for kind, _ in document]
    images = (len(kinds) - 1) // 2
    if kinds != ["vision", "voco"] * images + ["text"]:
        raise ValueError(f"expected (vision, VoCo) segments and then one text span, got {kinds}")
    stops = list(accumulate((length for _, length in document), initial=start))
    ranges = list(zip(stops[:-1], stops[1:], strict=True))
    segments = [(ranges[2 * i], ranges[2 * i + 1]) for i in range(images)]
    return segments, ranges[-1]


def _join_neighbours(ranges: list[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


class Split:
    """How tensors are cut and outputs joined. ``cut`` takes ``[B, H, S, D]``, ``join`` gives it
    back; both are differentiable, and both are paid for by a rival that is used as a drop-in."""

    calls: int

    def cut(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def join(self, outputs: list[Tensor]) -> Tensor:
        raise NotImplementedError


class TwoCalls(Split):
    """Equal rows: all segments in one causal call, as ``[B * images, H, vision + VoCo, D]``, and
    all text in another, ``[B, H, images * VoCo + text, D]``. With one image both are views."""

    def __init__(self, shape: Shape) -> None:
        pieces(shape)  # raises where the mask does not split
        document = shape.documents[0]
        if shape.packed or not shape.rows_equal or len(set(document[:-1])) != 2:
            raise ValueError(f"expected equal rows and equal segments, got shape {shape.name}")
        self.calls = 2
        self.images = (len(document) - 1) // 2
        self.vision, self.voco = document[0][1], document[1][1]
        self.segment = self.vision + self.voco

    def cut(self, x: Tensor) -> list[Tensor]:
        if self.images == 1:
            return [x[:, :, : self.segment], x[:, :, self.vision :]]
        text_start = self.images * self.segment
        segments = x[:, :, :text_start].unflatten(2, (self.images, self.segment))
        voco = segments[:, :, :, self.vision :].flatten(2, 3)
        text = torch.cat([voco.transpose(1, 2), x[:, :, text_start:].transpose(1, 2)], dim=1)
        return [segments.transpose(1, 2).flatten(0, 1), text.transpose(1, 2)]

    def join(self, outputs: list[Tensor]) -> Tensor:
        segments, text = outputs
        text = text[:, :, self.images * self.voco :].transpose(1, 2)
        segments = segments.transpose(1, 2)  # [B * images, segment, H, D]
        segments = segments.unflatten(0, (-1, self.images)).flatten(1, 2)
        return torch.cat([segments, text], dim=1).transpose(1, 2)


class PerDocument(Split):
    """A packed row without a varlen kernel: two causal calls a document, in a loop."""

    def __init__(self, shape: Shape) -> None:
        self.pieces = pieces(shape)
        if shape.batch != 1 or any(len(piece.ranges) != 1 for piece in self.pieces):
            raise ValueError(
                f"expected one row of documents with one segment each, got {shape.name}"
            )
        self.calls = len(self.pieces)

    def cut(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, start:stop] for ((start, stop),) in (p.ranges for p in self.pieces)]

    def join(self, outputs: list[Tensor]) -> Tensor:
        kept = [
            out[:, :, piece.dropped :].transpose(1, 2)
            for piece, out in zip(self.pieces, outputs, strict=True)
        ]
        return torch.cat(kept, dim=1).transpose(1, 2)


class Varlen(Split):
    """Any shape: every piece a sequence of one varlen call over gathered tokens ``[T, H, D]``.

    Attributes:
        cu_seqlens: int32 ``[pieces + 1]``, where each sequence starts.
        longest: tokens of the longest sequence.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        all_pieces = pieces(shape)
        self.calls = 1
        self.batch, self.length = shape.batch, shape.length
        taken, owner = [], torch.full((self.batch * self.length,), -1)
        count = 0
        for piece in all_pieces:
            tokens = torch.cat([torch.arange(*limits) for limits in piece.ranges])
            tokens = tokens + piece.row * self.length
            taken.append(tokens)
            owner[tokens[piece.dropped :]] = torch.arange(
                count + piece.dropped, count + len(tokens)
            )
            count += len(tokens)
        self.taken = torch.cat(taken).to(device)
        self.owner = owner.to(device)
        lengths = [piece.length for piece in all_pieces]
        starts = list(accumulate(lengths, initial=0))
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        self.longest = max(lengths)

    def cut(self, x: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2).flatten(0, 1).index_select(0, self.taken)]

    def join(self, outputs: list[Tensor]) -> Tensor:
        (out,) = outputs
        rows = out.index_select(0, self.owner)
        return rows.unflatten(0, (self.batch, self.length)).transpose(1, 2)
