"""Small layouts for tests: every form of the mask, with few round numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from voco_kernels import MaskLayout

Document = list[tuple[str, int]]


@dataclass(frozen=True)
class Case:
    """A layout's arguments: rows of documents of spans. Only a single row can have several documents."""

    rows: list[list[Document]]
    isolated: bool = False
    padding_side: str = "right"

    def layout(self, device: torch.device | str | None = None) -> MaskLayout:
        if len(self.rows) == 1 and len(self.rows[0]) > 1:
            return MaskLayout.packed(self.rows[0], isolated=self.isolated, device=device)
        return MaskLayout.from_spans(
            [document for (document,) in self.rows],
            isolated=self.isolated,
            padding_side=self.padding_side,
            device=device,
        )


def image(vision: int, voco: int, text: int = 0) -> Document:
    return [("vision", vision), ("voco", voco), ("text", text)]


RAGGED = [[image(20, 2, 30)], [[("text", 17)]], [[*image(30, 1, 5), *image(7, 3, 1)]]]

CASES = {
    "one token": Case([[[("text", 1)]]]),
    "no image": Case([[[("text", 37)]], [[("text", 37)]]]),
    "one image, 1 VoCo token": Case([[image(57, 1, 11)]] * 3),
    "one image, 8 VoCo tokens": Case([[image(33, 8, 26)]] * 2),
    "one image, 128 VoCo tokens": Case([[image(50, 128, 23)]]),
    "empty text": Case([[image(29, 3)]]),
    "long text": Case([[image(9, 1, 291)]]),
    "long image": Case([[image(270, 5, 19)]]),
    "5 tiles": Case([[[*image(24, 2) * 5, ("text", 21)]]]),
    "5 isolated tiles": Case([[[*image(24, 2) * 5, ("text", 21)]]], isolated=True),
    "20 isolated frames": Case([[[*image(5, 1) * 20, ("text", 9)]]], isolated=True),
    "3 images, 165 VoCo tokens": Case([[[*image(7, 55) * 3, ("text", 3)]]]),
    "text between images": Case(
        [[[("text", 6), *image(31, 2, 13), *image(17, 1, 5), *image(8, 4, 9)]]]
    ),
    "padded right": Case(RAGGED),
    "padded left": Case(RAGGED, padding_side="left"),
    "padded left, isolated": Case(RAGGED, padding_side="left", isolated=True),
    "documents": Case(
        [[image(23, 1, 31), [("text", 19)], image(30, 2, 7), [("text", 1)], image(5, 1, 40)]]
    ),
    "isolated documents": Case(
        [[image(23, 1), image(23, 1, 4), [*image(9, 2) * 3, ("text", 7)]]], isolated=True
    ),
    "documents that end with VoCo tokens": Case(
        [[image(23, 4), [*image(11, 1, 8), *image(19, 2)], image(40, 1)]]
    ),
}
