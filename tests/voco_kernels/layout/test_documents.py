"""Tests of document markers: each gives the same layout as lists of documents, or raises."""

from __future__ import annotations

import pytest
import torch

from voco_kernels import MaskLayout
from voco_kernels.layout.documents import document_positions

VOCO, IMAGE = 1, 2
# Three documents, one without an image: i(mage), v(oco), t(ext).
DOCUMENTS = ("iiivtt", "ttt", "tiivvt")
SPANS = [
    [("vision", 3), ("voco", 1), ("text", 2)],
    [("text", 3)],
    [("vision", 3), ("voco", 2), ("text", 1)],
]
LENGTHS = [len(document) for document in DOCUMENTS]
TOTAL = sum(LENGTHS)


def packed_ids(padding: int = 0) -> torch.Tensor:
    letters = "".join(DOCUMENTS)
    return torch.tensor([[{"i": IMAGE, "v": VOCO, "t": 7}[x] for x in letters] + [9] * padding])


def numbers(first: int, padding: int = 0) -> torch.Tensor:
    row = [first + i for i, length in enumerate(LENGTHS) for _ in range(length)]
    return torch.tensor([row + [0] * padding], dtype=torch.int32)


def positions(padding: int = 0) -> torch.Tensor:
    return torch.tensor([[i for length in LENGTHS for i in range(length)] + [0] * padding])


def cumulative(*more: int) -> torch.Tensor:
    return torch.tensor([0, 6, 9, 15, *more], dtype=torch.int32)


def layout(ids: torch.Tensor | None = None, **markers) -> MaskLayout:
    ids = packed_ids() if ids is None else ids
    return MaskLayout.from_input_ids(ids, voco_token_id=VOCO, **markers)


MARKERS = {
    "position_ids": {"position_ids": positions()},
    "sequence_ids": {"sequence_ids": numbers(0)},
    "cu_seqlens": {"cu_seqlens": cumulative()},
    "cu_seqlens with an empty document": {"cu_seqlens": torch.tensor([0, 6, 6, 9, 15, 15])},
    "numbers in attention_mask": {"attention_mask": numbers(1)},
    "all of them": {
        "position_ids": positions(),
        "sequence_ids": numbers(0),
        "cu_seqlens": cumulative(),
        "attention_mask": numbers(1),
    },
    "a mask of ones beside them": {
        "cu_seqlens": cumulative(),
        "attention_mask": torch.ones(1, TOTAL, dtype=torch.long),
    },
}


@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
def test_each_marker_gives_the_packed_layout(markers):
    expected = MaskLayout.packed(SPANS)
    got = layout(**markers)
    assert torch.equal(got.materialize(), expected.materialize())
    assert torch.equal(got.schedule.host_query_tiles(), expected.schedule.host_query_tiles())


@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
def test_places_in_documents(markers):
    assert torch.equal(document_positions(packed_ids(), **markers), positions())


PADDED = {
    "numbers": {"attention_mask": numbers(1, 4)},
    "numbers, and position_ids that count padding as 0": {
        "attention_mask": numbers(1, 4),
        "position_ids": positions(4),
    },
    "cu_seqlens up to the padding": {
        "attention_mask": numbers(1, 4) > 0,
        "cu_seqlens": cumulative(),
    },
    "padding as a document": {"attention_mask": numbers(1, 4) > 0, "cu_seqlens": cumulative(19)},
}


@pytest.mark.parametrize("markers", PADDED.values(), ids=PADDED)
def test_padding_behind_packed_documents(markers):
    mask = layout(packed_ids(4), **markers).materialize()
    assert torch.equal(mask[:, :TOTAL, :TOTAL], MaskLayout.packed(SPANS).materialize())
    assert not mask[:, TOTAL:].any() and not mask[:, :, TOTAL:].any()


def test_several_rows():
    ids = packed_ids().expand(2, -1)
    rows = torch.tensor([[1] * 6 + [2] * 9, [1] * 9 + [2] * 6])
    by_numbers = layout(ids, attention_mask=rows)
    by_lengths = layout(ids, cu_seqlens=torch.tensor([0, 6, 15, 24, 30]))
    assert torch.equal(by_numbers.materialize(), by_lengths.materialize())
    assert not by_numbers.materialize()[0, 6:, :6].any()
    assert by_numbers.materialize()[1, 7, 6] and not by_numbers.materialize()[1, 9:, :9].any()


REFUSED = {
    "not from 0": ({"cu_seqlens": torch.tensor([1, 6, 15])}, "starting at 0, got \\[1, 6, 15\\]"),
    "decreasing": ({"cu_seqlens": torch.tensor([0, 9, 6, 15])}, "never decreasing"),
    "too short": ({"cu_seqlens": torch.tensor([0, 6, 9])}, "up to the 15 tokens"),
    "too long": ({"cu_seqlens": torch.tensor([0, 6, 16])}, "up to the 15 tokens"),
    "batched": ({"cu_seqlens": cumulative()[None]}, r"\[documents \+ 1\].*got \[1, 4\]"),
    "elsewhere": (
        {"cu_seqlens": cumulative().to("meta")},
        r"on cpu like input_ids, got \[4\] on meta",
    ),
    "numbers that decrease": (
        {"attention_mask": torch.tensor([[1] * 6 + [2] * 3 + [1] * 6])},
        "increase along a row, got 1 after 2 at position 9 of row 0",
    ),
    "numbers against positions": (
        {"attention_mask": numbers(1), "position_ids": torch.arange(TOTAL)[None]},
        "attention_mask and position_ids to agree.*position 6 of row 0 in attention_mask",
    ),
    "lengths against positions": (
        {"cu_seqlens": torch.tensor([0, 9, 15]), "position_ids": positions()},
        "cu_seqlens and position_ids to agree.*position 6 of row 0 in position_ids",
    ),
    "lengths against sequence_ids": (
        {"cu_seqlens": torch.tensor([0, 5, 9, 15]), "sequence_ids": numbers(0)},
        "cu_seqlens and sequence_ids to agree.*position 5 of row 0 in cu_seqlens",
    ),
    "three axes": (
        {"position_ids": positions().expand(3, 1, -1)},
        r"position_ids of shape \[1, 15\].*got \[3, 1, 15\]",
    ),
    "below zero": ({"attention_mask": numbers(-3)}, "0 for padding and.*got -3"),
}


@pytest.mark.parametrize(("markers", "message"), REFUSED.values(), ids=REFUSED)
def test_markers_that_do_not_fit_are_refused(markers, message):
    with pytest.raises(ValueError, match=f"expected .*{message}"):
        layout(**markers)


def test_rows_that_share_a_document_are_refused():
    with pytest.raises(ValueError, match="a document starting in each row"):
        layout(packed_ids().expand(2, -1), cu_seqlens=torch.tensor([0, 6, 20, 30]))


@pytest.mark.parametrize(
    ("markers", "message"),
    [
        (
            {"attention_mask": numbers(1).float()},
            "a bool or integer attention_mask, got torch.float32",
        ),
        ({"position_ids": positions().float()}, "an integer position_ids, got torch.float32"),
        ({"sequence_ids": numbers(0) > 0}, "an integer sequence_ids, got torch.bool"),
        ({"cu_seqlens": [0, 6, 15]}, "cu_seqlens as a tensor, got list"),
    ],
)
def test_wrong_types_are_refused(markers, message):
    with pytest.raises(TypeError, match=message):
        layout(**markers)


def test_compiles_whole_and_still_refuses():
    """Values can't be read at trace time, so the check becomes an assertion at run time."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def visibility(ids, mask, cu_seqlens):
        made = layout(ids, attention_mask=mask, cu_seqlens=cu_seqlens)
        return made.visible_from, made.visible_until

    expected = MaskLayout.packed(SPANS)
    got = visibility(packed_ids(), numbers(1), cumulative())
    assert torch.equal(got[0], expected.visible_from) and torch.equal(
        got[1], expected.visible_until
    )
    with pytest.raises(RuntimeError, match="cu_seqlens never decreasing"):
        visibility(packed_ids(), numbers(1), torch.tensor([0, 9, 6, 15], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cu_seqlens and attention_mask to agree"):
        visibility(packed_ids(), numbers(1), torch.tensor([0, 6, 8, 15], dtype=torch.int32))
    torch.compiler.reset()
