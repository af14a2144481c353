"""The seven shapes, A to G, that every figure of this project is measured on.

Each has three sizes of the same structure: ``full`` for a GPU, ``small`` for a CPU, ``tiny``
for a rehearsal in CI.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from voco_kernels import MaskLayout

Span = tuple[str, int]
Document = tuple[Span, ...]

TEXT_TOKEN, IMAGE_TOKEN, VOCO_TOKEN = 1, 2, 3
"""Token ids of ``Shape.token_ids``. Any ids would do: only the kinds matter to a mask."""

PACKED_SEED = 20
"""Shape G's text lengths are ``random.Random(20).randint(low, high)``, one draw a document."""


@dataclass(frozen=True)
class Shape:
    """One shape: the spans of each row of the batch, or of each document of one packed row.

    Attributes:
        name: ``"A"`` to ``"G"``.
        title: the lengths in words, for tables.
        documents: ``(kind, length)`` spans; kinds as in ``MaskLayout.from_spans``.
        isolated: segments do not see what stood before them.
        packed: the documents stand one after the other in a batch of 1.
    """

    name: str
    title: str
    documents: tuple[Document, ...]
    isolated: bool = False
    packed: bool = False

    @property
    def batch(self) -> int:
        return 1 if self.packed else len(self.documents)

    @property
    def length(self) -> int:
        lengths = [sum(length for _, length in document) for document in self.documents]
        return sum(lengths) if self.packed else max(lengths)

    @property
    def rows_equal(self) -> bool:
        """All rows of the batch have the same mask."""
        return self.batch == 1 or len(set(self.documents)) == 1

    def layout(self, device: torch.device | str) -> MaskLayout:
        if self.packed:
            return MaskLayout.packed(self.documents, isolated=self.isolated, device=device)
        return MaskLayout.from_spans(self.documents, isolated=self.isolated, device=device)

    def token_ids(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``position_ids``, int64 ``[B, S]``, that give the same layout."""
        kinds = {"text": TEXT_TOKEN, "vision": IMAGE_TOKEN, "voco": VOCO_TOKEN}
        ids = [
            torch.cat([torch.full((length,), kinds[kind]) for kind, length in document])
            for document in self.documents
        ]
        positions = [torch.arange(len(document)) for document in ids]
        if self.packed:
            return torch.cat(ids)[None].to(device), torch.cat(positions)[None].to(device)
        return torch.stack(ids).to(device), torch.stack(positions).to(device)


class Size(NamedTuple):
    """A set of shapes, and the heads to run them with."""

    shapes: dict[str, Shape]
    heads: tuple[tuple[int, int], ...]
    head_dim: int


def one_image(name: str, vision: int, voco: int, text: int, batch: int) -> Shape:
    """``batch`` equal rows ``[vision | VoCo | text]``."""
    row = (("vision", vision), ("voco", voco), ("text", text))
    return Shape(name, f"{vision}, {voco}, {text} x {batch}", (row,) * batch)


def many_images(name: str, images: int, vision: int, voco: int, text: int) -> Shape:
    """One row: ``images`` isolated segments, then text."""
    row = (("vision", vision), ("voco", voco)) * images + (("text", text),)
    title = f"{images} isolated ({vision}, {voco}), then {text} x 1"
    return Shape(name, title, (row,), isolated=True)


def packed(name: str, documents: int, vision: int, voco: int, low: int, high: int) -> Shape:
    """One packed row of one-image documents, their text lengths drawn from ``low`` to ``high``."""
    draw = random.Random(PACKED_SEED)
    rows = tuple(
        (("vision", vision), ("voco", voco), ("text", draw.randint(low, high)))
        for _ in range(documents)
    )
    title = f"packed: {documents} of ({vision}, {voco}, {low} to {high})"
    return Shape(name, title, rows, packed=True)


def _by_name(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


SIZES = {
    "full": Size(
        _by_name(
            one_image("A", 576, 1, 114, batch=16),
            one_image("B", 576, 8, 512, batch=16),
            one_image("C", 576, 1, 1470, batch=8),
            one_image("D", 2880, 5, 114, batch=4),
            one_image("E", 2880, 5, 1000, batch=4),
            many_images("F", 64, 576, 1, 2048),
            packed("G", 64, 576, 1, 20, 2000),
        ),
        heads=((32, 32), (32, 8)),
        head_dim=128,
    ),
    "small": Size(
        _by_name(
            one_image("A", 576, 1, 114, batch=2),
            one_image("B", 576, 8, 512, batch=2),
            one_image("C", 576, 1, 1470, batch=1),
            one_image("D", 2880, 5, 114, batch=1),
            one_image("E", 2880, 5, 1000, batch=1),
            many_images("F", 6, 576, 1, 512),
            packed("G", 4, 576, 1, 20, 500),
        ),
        heads=((8, 8), (8, 2)),
        head_dim=64,
    ),
    "tiny": Size(
        _by_name(
            one_image("A", 24, 1, 9, batch=3),
            one_image("B", 24, 4, 21, batch=3),
            one_image("C", 24, 1, 61, batch=2),
            one_image("D", 120, 5, 9, batch=2),
            one_image("E", 120, 5, 41, batch=2),
            many_images("F", 6, 24, 1, 33),
            packed("G", 5, 24, 1, 2, 60),
        ),
        heads=((4, 4), (4, 2)),
        head_dim=32,
    ),
}
"""Shapes by size. ``full`` is the set that the project's goals are stated for (bf16)."""
