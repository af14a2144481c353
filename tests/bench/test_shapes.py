"""The shapes A to G: what they are, and that their layouts are the mask they describe."""

from __future__ import annotations

import random

import pytest
import torch

from bench.attention.shapes import IMAGE_TOKEN, PACKED_SEED, SIZES, VOCO_TOKEN
from voco_kernels import MaskLayout

TINY = SIZES["tiny"].shapes


def brute_force(shape) -> torch.Tensor:
    """The mask, query by query and key by key, from the words of the definition."""
    mask = torch.zeros(shape.batch, shape.length, shape.length, dtype=torch.bool)
    offset = 0
    for index, document in enumerate(shape.documents):
        row = 0 if shape.packed else index
        tokens = []  # kind and segment of each token; text has none
        segment = 0
        for kind, length in document:
            tokens += [(kind, None if kind == "text" else segment)] * length
            segment += kind == "voco"
        for i, (_, query_segment) in enumerate(tokens):
            for j in range(i + 1):
                key_kind, key_segment = tokens[j]
                same = query_segment == key_segment
                if query_segment is not None and shape.isolated:
                    visible = same
                else:
                    visible = key_kind != "vision" or same
                mask[row, offset + i, offset + j] = visible
        offset = offset + len(tokens) if shape.packed else 0
    return mask


@pytest.mark.parametrize("name", TINY)
def test_tiny_layouts_equal_brute_force(name):
    layout = TINY[name].layout("cpu")
    expected = brute_force(TINY[name])
    assert torch.equal(layout.materialize(), expected)
    assert layout.pairs() == int(expected.sum())
    assert (layout.batch, layout.length) == (TINY[name].batch, TINY[name].length)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", "ABCDEFG")
def test_token_ids_give_the_same_layout(size, name):
    shape = SIZES[size].shapes[name]
    ids, positions = shape.token_ids("cpu")
    read = MaskLayout.from_input_ids(
        ids,
        voco_token_id=VOCO_TOKEN,
        image_token_id=IMAGE_TOKEN,
        position_ids=positions if shape.packed else None,
        isolated=shape.isolated,
    )
    made = shape.layout("cpu")
    assert torch.equal(read.visible_from, made.visible_from)
    assert torch.equal(read.visible_until, made.visible_until)


@pytest.mark.parametrize("size", SIZES)
def test_useful_work_adds_up(size):
    """A segment of L tokens has L (L + 1) / 2 pairs; text behind m VoCo tokens, T m + T (T + 1) /
    2."""
    for shape in SIZES[size].shapes.values():
        pairs = 0
        for document in shape.documents:
            lengths = [length for _, length in document]
            segments = list(zip(lengths[:-1:2], lengths[1:-1:2], strict=True))
            text, kept = lengths[-1], sum(voco for _, voco in segments)
            pairs += sum((v + m) * (v + m + 1) // 2 for v, m in segments)
            pairs += text * kept + text * (text + 1) // 2
        layout = shape.layout("cpu")
        assert layout.pairs() == pairs
        assert layout.flops(32, 128) == 4 * 128 * 32 * pairs
        assert layout.flops(32, 128, backward=True) == 10 * 128 * 32 * pairs


def test_full_shapes_are_those_of_the_design():
    full = SIZES["full"]
    assert full.heads == ((32, 32), (32, 8)) and full.head_dim == 128
    one_image = {
        "A": (576, 1, 114, 16),
        "B": (576, 8, 512, 16),
        "C": (576, 1, 1470, 8),
        "D": (2880, 5, 114, 4),
        "E": (2880, 5, 1000, 4),
    }
    for name, (vision, voco, text, batch) in one_image.items():
        row = (("vision", vision), ("voco", voco), ("text", text))
        assert full.shapes[name].documents == (row,) * batch
    f, g = full.shapes["F"], full.shapes["G"]
    assert f.isolated and f.documents == ((("vision", 576), ("voco", 1)) * 64 + (("text", 2048),),)
    draw = random.Random(PACKED_SEED)
    texts = [draw.randint(20, 2000) for _ in range(64)]
    assert g.packed and g.batch == 1 and [d[-1][1] for d in g.documents] == texts
    assert min(texts) >= 20 and max(texts) <= 2000 and g.length == 64 * 577 + sum(texts)


def test_sizes_keep_their_structure():
    for name, full in SIZES["full"].shapes.items():
        for size in ("small", "tiny"):
            other = SIZES[size].shapes[name]
            assert (other.packed, other.isolated) == (full.packed, full.isolated)
            kinds = {tuple(kind for kind, _ in document)[-3:] for document in other.documents}
            assert kinds == {("vision", "voco", "text")}
            assert other.rows_equal == full.rows_equal
