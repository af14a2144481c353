"""Tests of MaskLayout: constructors against the mask's definition, counts, descriptions and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.voco_kernels.brute_force import Token, brute_force_mask, mask_of_tokens
from tests.voco_kernels.cases import CASES, Case, image
from tests.voco_kernels.strategies import cases
from voco_kernels import MaskLayout
from voco_kernels.layout.describe import row_documents

TEXT_ID, IMAGE_ID, VOCO_ID = 7, 32000, 32001
IDS = {"t": TEXT_ID, "i": IMAGE_ID, "v": VOCO_ID, "_": 0}
SOME_LAYOUT = Case([[image(5, 2, 3)], [[("text", 4)]]])


def mask_of(case: Case) -> Tensor:
    return brute_force_mask(case.rows, isolated=case.isolated, padding_side=case.padding_side)


def ids(*rows: str) -> Tensor:
    """Token ids of rows written as t(ext), i(mage), v(oco) and _ (padding)."""
    return torch.tensor([[IDS[letter] for letter in row] for row in rows])


def mask_of_letters(rows: list[str], by_image_token: bool, isolated: bool) -> Tensor:
    """The mask of documents separated by spaces, as the docstring of ``from_input_ids`` defines it."""
    return mask_of_tokens([tokens_of_letters(row, by_image_token) for row in rows], isolated)


def tokens_of_letters(row: str, by_image_token: bool) -> list[Token]:
    """Consecutive VoCo tokens replace everything since the previous ones, or since the first image token
    after those; the first in a document replace everything since its start."""
    kinds = {"t": "text", "i": "text", "v": "voco", "_": "padding"}
    tokens: list[Token] = []
    for number, document in enumerate(row.split(" ")):
        members = [Token(kinds[letter], number) for letter in document]
        since = 0
        for count, run in enumerate(re.finditer("v+", document)):
            first = since
            if by_image_token and count > 0:
                first = document.index("i", since, run.start())
            for token in members[first : run.end()]:
                if token.kind != "padding":
                    token.segment = len(tokens) + run.start()
                    token.kind = "vision" if token.kind == "text" else token.kind
            since = run.end()
        tokens += members
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_spans_and_documents_equal_the_definition(name):
    layout = CASES[name].layout()
    assert layout.visible_from.dtype == layout.visible_until.dtype == torch.int32
    assert torch.equal(layout.materialize(), mask_of(CASES[name]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_drawn_spans_and_documents_equal_the_definition(case):
    layout = case.layout()
    mask = layout.materialize()
    assert torch.equal(mask, mask_of(case))
    assert layout.pairs() == mask.sum()


@pytest.mark.parametrize("lengths", [(9, 1, 5), (4, 3, 0), (0, 0, 6), (6, 0, 2), (1, 1, 1)])
def test_lengths_equal_the_definition(lengths):
    layout = MaskLayout.from_lengths(*lengths, batch=3)
    assert (layout.batch, layout.length) == (3, sum(lengths))
    assert torch.equal(layout.materialize(), brute_force_mask([[image(*lengths)]] * 3))


LETTERS = {
    "one image": ["tiiiivtttt", "tiiivvvttt"],
    "several images": ["iiivttiivvtttiiivtt", "iivtttttttttiiiiivt"],
    "side by side": ["iivviivviivvt"],
    "no image": ["tttttt", "iiiiii"],
    "nothing but context": ["ttiiivv"],
    "documents": ["tiivtt ttt iivt iiivttiv"],
    "padded right": ["tiivtttt___", "tiiiivttttt"],
    "padded left": ["___tiivtttt", "tiiiivttttt"],
}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("by_image_token", [False, True])
@pytest.mark.parametrize("rows", LETTERS.values(), ids=LETTERS)
def test_input_ids_equal_the_definition(rows, by_image_token, isolated):
    tokens = [row.replace(" ", "") for row in rows]
    packed = any(" " in row for row in rows)
    positions = [
        [place for document in row.split(" ") for place in range(len(document))] for row in rows
    ]
    layout = MaskLayout.from_input_ids(
        ids(*tokens),
        voco_token_id=VOCO_ID,
        image_token_id=IMAGE_ID if by_image_token else None,
        attention_mask=torch.tensor([[int(letter != "_") for letter in row] for row in tokens]),
        position_ids=torch.tensor(positions) if packed else None,
        isolated=isolated,
    )
    assert torch.equal(layout.materialize(), mask_of_letters(rows, by_image_token, isolated))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_drawn_input_ids_equal_the_definition(data):
    """Rows of documents in which all VoCo tokens have context; some packed, some padded."""
    runs = st.tuples(st.sampled_from("tti"), st.integers(1, 5), st.integers(0, 3))
    document = st.lists(runs, min_size=1, max_size=5).map(
        lambda drawn: "".join(letter * count + "v" * voco for letter, count, voco in drawn)
    )
    row = " ".join(data.draw(st.lists(document, min_size=1, max_size=3)))
    by_image_token, isolated = data.draw(st.booleans()), data.draw(st.booleans())
    # If image_token_id is given, VoCo tokens after a document's first need an image token for context.
    if by_image_token:
        row = re.sub("(?<=v)t+v", lambda run: "i" + run.group(), row)
    tokens = row.replace(" ", "")
    layout = MaskLayout.from_input_ids(
        ids(tokens),
        voco_token_id=VOCO_ID,
        image_token_id=IMAGE_ID if by_image_token else None,
        position_ids=torch.tensor([[i for part in row.split(" ") for i in range(len(part))]]),
        isolated=isolated,
    )
    assert torch.equal(layout.materialize(), mask_of_letters([row], by_image_token, isolated))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 9)),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    ),
    isolated=st.booleans(),
)
def test_input_ids_and_spans_agree(rows, isolated):
    spans = [[span for lengths in row for span in image(*lengths)] for row in rows]
    layout = MaskLayout.from_spans(spans, isolated=isolated)
    letters = [
        "".join("i" * vision + "v" * voco + "t" * text for vision, voco, text in row).ljust(
            layout.length, "_"
        )
        for row in rows
    ]
    from_ids = MaskLayout.from_input_ids(
        ids(*letters),
        voco_token_id=VOCO_ID,
        image_token_id=IMAGE_ID,
        attention_mask=ids(*letters) != IDS["_"],
        isolated=isolated,
    )
    for ours, theirs in zip(from_ids.tensors()[:2], layout.tensors()[:2], strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    before=st.text("ti", min_size=1, max_size=12),
    voco=st.integers(1, 5),
    after=st.text("t", max_size=12),
    padding=st.integers(0, 5),
    left=st.booleans(),
)
def test_authors_mask(before, voco, after, padding, left):
    """The authors' ``make_voco_mask_llava``: causal, except that tokens after the last VoCo token only
    see keys from the first VoCo token on. Everything before it, including text, is hidden from them."""
    row = before + "v" * voco + after
    first, last = len(before), len(before) + voco - 1
    expected = torch.ones(len(row), len(row), dtype=torch.bool).tril()
    expected[last + 1 :, :first] = False

    row = row.rjust(len(row) + padding, "_") if left else row.ljust(len(row) + padding, "_")
    layout = MaskLayout.from_input_ids(
        ids(row), voco_token_id=VOCO_ID, attention_mask=(ids(row) != IDS["_"]).long()
    )
    real = ids(row)[0] != IDS["_"]
    mask = layout.materialize()[0]
    assert torch.equal(mask[real][:, real], expected)
    assert not mask[~real].any() and not mask[:, ~real].any()


def test_integer_types_of_input_ids_and_masks():
    wanted = MaskLayout.from_input_ids(ids("iivtt_"), voco_token_id=VOCO_ID)
    for dtype in (torch.int32, torch.int64):
        layout = MaskLayout.from_input_ids(ids("iivtt_").to(dtype), voco_token_id=VOCO_ID)
        assert torch.equal(layout.materialize(), wanted.materialize())
    masks = [
        torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=d) for d in (torch.bool, torch.int64, torch.uint8)
    ]
    layouts = [
        MaskLayout.from_input_ids(ids("iivtt_"), voco_token_id=VOCO_ID, attention_mask=mask)
        for mask in masks
    ]
    assert all(torch.equal(layouts[0].materialize(), other.materialize()) for other in layouts)


WRONG = {
    "negative length": (lambda: MaskLayout.from_lengths(-3, 1, 2), "-3"),
    "negative text": (lambda: MaskLayout.from_lengths(3, 1, -2), "-2"),
    "no token": (lambda: MaskLayout.from_lengths(0, 0, 0), "at least one token.*row 0"),
    "no row": (lambda: MaskLayout.from_spans([]), "at least one row"),
    "no document": (lambda: MaskLayout.packed([]), "at least one token"),
    "empty row": (lambda: MaskLayout.from_spans([[("text", 2)], []]), "row 1"),
    "batch of none": (lambda: MaskLayout.from_lengths(3, 1, 2, batch=0), "batch >= 1, got 0"),
    "VoCo first": (lambda: MaskLayout.from_lengths(0, 4, 9), "4 VoCo tokens after nothing"),
    "VoCo after text": (
        lambda: MaskLayout.from_spans([[("text", 5)], [("text", 1), ("voco", 2)]]),
        "2 VoCo tokens after text in row 1",
    ),
    "fractional length": (lambda: MaskLayout.from_spans([[("text", 2.5)]]), "2.5"),
    "kind": (lambda: MaskLayout.from_spans([[("image", 5)]]), "vision.*'image'"),
    "padding side": (
        lambda: MaskLayout.from_spans([[("text", 5)]], padding_side="both"),
        "'left' or 'right', got 'both'",
    ),
    "hole in attention_mask": (
        lambda: MaskLayout.from_input_ids(
            ids("iivttt"), voco_token_id=VOCO_ID, attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1]])
        ),
        r"row 0, at positions \[3\] of 6",
    ),
    "stray VoCo token": (
        lambda: MaskLayout.from_input_ids(ids("iivtt", "vtttt"), voco_token_id=VOCO_ID),
        f"{VOCO_ID} at position 0 of row 1",
    ),
    "VoCo run without image token": (
        lambda: MaskLayout.from_input_ids(
            ids("iivttvt"), voco_token_id=VOCO_ID, image_token_id=IMAGE_ID
        ),
        "at position 5 of row 0",
    ),
    "attention_mask of another shape": (
        lambda: MaskLayout.from_input_ids(
            ids("iivt"), voco_token_id=VOCO_ID, attention_mask=torch.ones(1, 3)
        ),
        r"\[1, 4\].*\[1, 3\]",
    ),
    "position_ids of another shape": (
        lambda: MaskLayout.from_input_ids(
            ids("iivt"), voco_token_id=VOCO_ID, position_ids=torch.arange(4)
        ),
        r"\[1, 4\].*\[4\]",
    ),
    "input_ids of one dimension": (
        lambda: MaskLayout.from_input_ids(ids("iivt")[0], voco_token_id=VOCO_ID),
        r"\[B, S\].*\[4\]",
    ),
    "fractional input_ids": (
        lambda: MaskLayout.from_input_ids(ids("iivt").float(), voco_token_id=VOCO_ID),
        "integer.*float32",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_names_the_numbers(make, message):
    with pytest.raises(ValueError, match=f"(?s)expected.*{message}"):
        make()


@pytest.mark.parametrize("name", CASES)
def test_pairs_and_flops_count_the_visible_pairs(name):
    layout = CASES[name].layout()
    pairs = int(mask_of(CASES[name]).sum())
    assert layout.pairs() == pairs
    assert layout.flops(num_heads=6, head_dim=64) == 4 * 64 * 6 * pairs
    assert layout.flops(num_heads=6, head_dim=64, backward=True) == 4 * 64 * 6 * pairs * 5 // 2


def test_to_another_device_and_back():
    layout = SOME_LAYOUT.layout()
    assert layout.to("cpu") is layout and layout.to(torch.device("cpu")) is layout
    elsewhere = layout.to("meta")
    assert elsewhere.device.type == "meta"
    assert {tensor.device.type for tensor in elsewhere.tensors()} == {"meta"}
    assert (elsewhere.batch, elsewhere.length) == (layout.batch, layout.length)


def test_tensors_and_back():
    layout = SOME_LAYOUT.layout()
    again = MaskLayout.from_tensors(*layout.tensors())
    assert all(a is b for a, b in zip(again.tensors(), layout.tensors(), strict=True))


@pytest.mark.parametrize("isolated", [False, True])
def test_compiles_whole_and_once(isolated):
    """If segment lengths change, only values change, not shapes."""

    def visibility(input_ids, attention_mask):
        layout = MaskLayout.from_input_ids(
            input_ids,
            voco_token_id=VOCO_ID,
            image_token_id=IMAGE_ID,
            attention_mask=attention_mask,
            isolated=isolated,
        )
        return layout.tensors()

    compiled = torch.compile(visibility, fullgraph=True, backend="aot_eager", dynamic=False)
    for stance, row in (
        ("default", "tiiiivvttttt"),
        ("fail_on_recompile", "iivttiiiivtt"),
        ("fail_on_recompile", "iivttttttt__"),
    ):
        arguments = ids(row), (ids(row) != IDS["_"]).long()
        with torch.compiler.set_stance(stance):
            tensors = compiled(*arguments)
        for ours, eager in zip(tensors, visibility(*arguments), strict=True):
            assert torch.equal(ours, eager)


REPRS = [
    (
        MaskLayout.from_lengths(576, 1, 114, batch=16),
        "MaskLayout(batch=16, length=691, cpu: vision 576 | VoCo 1 | text 114; "
        "173,422 pairs a row, 72.5% of causal)",
    ),
    (
        MaskLayout.from_spans([[*image(9, 1) * 64, ("text", 20)]], isolated=True),
        "MaskLayout(batch=1, length=660, cpu: 64 x (vision 9 | VoCo 1) | text 20, isolated; "
        "5,010 pairs, 2.3% of causal)",
    ),
    (
        MaskLayout.from_spans([image(4, 1, 5), [("text", 3)]]),
        "MaskLayout(batch=2, length=10, cpu: rows of 3 to 10 tokens, the first: "
        "vision 4 | VoCo 1 | text 5; 41 pairs, 67.2% of causal)",
    ),
    (
        MaskLayout.packed([image(4, 1, 5), [("text", 3)]]),
        "MaskLayout(batch=1, length=13, cpu: 2 documents of 3 to 10 tokens, the first: "
        "vision 4 | VoCo 1 | text 5, the last: causal 3; 41 pairs, 45.1% of causal)",
    ),
    (
        MaskLayout.packed([image(4, 1, 5)] * 3),
        "MaskLayout(batch=1, length=30, cpu: 3 documents of vision 4 | VoCo 1 | text 5; "
        "105 pairs, 22.6% of causal)",
    ),
    (
        MaskLayout.from_lengths(0, 0, 300),
        "MaskLayout(batch=1, length=300, cpu: causal 300; 45,150 pairs, 100.0% of causal)",
    ),
    (
        MaskLayout.from_spans([[span for i in range(9) for span in image(5 + i, 1, 1 + i)]]),
        "MaskLayout(batch=1, length=135, cpu: vision 5 | VoCo 1 | text 1 | vision 6 | "
        "... 22 more ... | text 9; 3,735 pairs, 40.7% of causal)",
    ),
    (
        MaskLayout.from_input_ids(
            ids("____"), voco_token_id=VOCO_ID, attention_mask=torch.zeros(1, 4, dtype=torch.long)
        ),
        "MaskLayout(batch=1, length=4, cpu: padding only; 0 pairs)",
    ),
]


@pytest.mark.parametrize(("layout", "text"), REPRS)
def test_repr(layout, text):
    assert repr(layout) == text


@settings(max_examples=100, deadline=None)
@given(cases())
def test_documents_read_off_the_mask_give_the_mask(case):
    layout = case.layout()
    for row in range(layout.batch):
        real = layout.visible_until[row] > 0
        documents = row_documents(layout.visible_from[row], layout.visible_until[row])
        assert sum(length for document in documents for _, length in document) == real.sum()
        if not case.isolated:
            again = MaskLayout.packed(documents).materialize()[0]
            assert torch.equal(again, layout.materialize()[row][real][:, real])


@pytest.mark.gpu
def test_on_cuda_equals_the_cpu_without_a_sync():
    rows = ids("tiiiivvttttt", "iivttiiiivtt", "iivttttttt__")
    options = dict(voco_token_id=VOCO_ID, image_token_id=IMAGE_ID)
    here = MaskLayout.from_input_ids(rows, attention_mask=rows != IDS["_"], **options)
    there = rows.cuda()
    mask = there != IDS["_"]
    MaskLayout.from_input_ids(there, attention_mask=mask, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = MaskLayout.from_input_ids(there, attention_mask=mask, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(layout.materialize().cpu(), here.materialize())
    assert repr(layout) == repr(here).replace("cpu", "cuda:0")


@pytest.mark.parametrize("first", [0, 1, 7])
def test_packed_documents_may_start_at_any_position(first):
    """As in Transformers, a document starts where position ids don't increase by 1."""
    positions = [*range(first, first + 4), *range(first, first + 3)]
    layout = MaskLayout.from_input_ids(
        torch.full((1, 7), 5), voco_token_id=VOCO_ID, position_ids=torch.tensor([positions])
    )
    packed = MaskLayout.packed([[("text", 4)], [("text", 3)]])
    assert torch.equal(layout.materialize(), packed.materialize())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskLayout.from_spans([("vision", 5), ("voco", 1)]), "pass a list of rows"),
        (
            lambda: MaskLayout.from_input_ids(torch.zeros(0, 4).long(), voco_token_id=1),
            "B, S >= 1",
        ),
        (lambda: MaskLayout.from_lengths(5, 1, 1, batch=2.0), "batch >= 1, got 2.0"),
    ],
)
def test_beginners_slips_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_token_id_that_is_no_number_is_explained():
    with pytest.raises(TypeError, match="voco_token_id as an int, got Tensor and NoneType"):
        MaskLayout.from_input_ids(torch.zeros(1, 4).long(), voco_token_id=None)


TOO_MANY = {
    "a length": lambda: MaskLayout.from_lengths(2**31, 1, 1),
    "rows": lambda: MaskLayout.from_lengths(1, 1, 1, batch=2**31),
    "a span": lambda: MaskLayout.from_spans([[("text", 2**40)], [("text", 1)]]),
    "spans together": lambda: MaskLayout.packed([[("text", 2**27)]] * 3),
    "ids": lambda: MaskLayout.from_input_ids(
        torch.tensor([[5]]).expand(2**15, 2**14), voco_token_id=VOCO_ID
    ),
}


@pytest.mark.parametrize("make", TOO_MANY.values(), ids=TOO_MANY)
def test_more_tokens_than_int32_tables_hold_are_refused_at_once(make):
    """They raise before anything of that size is allocated; no tensor of that size would fit."""
    with pytest.raises(ValueError, match=r"at most 268435456 tokens in a batch.*split the batch"):
        make()


def test_numpy_integers_are_integers():
    by_python = MaskLayout.from_lengths(5, 2, 6, batch=3)
    by_numpy = MaskLayout.from_lengths(np.int64(5), np.int32(2), np.uint8(6), batch=np.int16(3))
    assert torch.equal(by_numpy.materialize(), by_python.materialize())
    # Sums of lengths would overflow in unsigned 8-bit integers.
    many = MaskLayout.from_spans(
        [[("vision", np.uint8(200)), ("voco", 1), ("text", np.uint8(200))]]
    )
    assert many.length == 401
    rows = ids("iivtiivt")
    by_numpy = MaskLayout.from_input_ids(
        rows, voco_token_id=np.int64(VOCO_ID), image_token_id=np.int32(IMAGE_ID)
    )
    by_python = MaskLayout.from_input_ids(rows, voco_token_id=VOCO_ID, image_token_id=IMAGE_ID)
    assert torch.equal(by_numpy.materialize(), by_python.materialize())


@pytest.mark.parametrize("wrong", [True, np.True_, 2.0, np.float64(2), "2"])
def test_what_is_no_integer_is_refused(wrong):
    with pytest.raises(ValueError, match="length >= 0"):
        MaskLayout.from_lengths(wrong, 1, 1)
    with pytest.raises(ValueError, match="batch >= 1"):
        MaskLayout.from_lengths(1, 1, 1, batch=wrong)
    with pytest.raises(TypeError, match="voco_token_id as an int"):
        MaskLayout.from_input_ids(ids("iivt"), voco_token_id=wrong)
    with pytest.raises(TypeError, match="image_token_id as an int or None"):
        MaskLayout.from_input_ids(ids("iivt"), voco_token_id=VOCO_ID, image_token_id=wrong)
