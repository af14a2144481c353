"""The arithmetic of tiles, on cases small enough to count by hand."""

from __future__ import annotations

import pytest

from bench.attention import tiles
from bench.attention.shapes import SIZES
from voco_kernels import MaskLayout


def text(length: int) -> MaskLayout:
    return MaskLayout.from_lengths(0, 0, length)


def test_two_calls():
    assert tiles.pairs_of_two_calls(text(128)) == 128 * 128
    assert tiles.pairs_of_two_calls(text(129)) == 3 * 128 * 128
    one_image = MaskLayout.from_lengths(100, 1, 20)
    assert tiles.pairs_of_two_calls(one_image) == 2 * 128 * 128


@pytest.mark.parametrize(
    ("length", "blocks", "narrow"),
    [
        (1, 0, 1),  # one query and one key: a narrow block
        (64, 1, 0),
        (65, 1, 2),  # the first query by itself; the other 64 see it and their own block
        (128, 3, 0),
        (577, 45, 10),  # 1 + 2 + ... + 9 blocks, and every consumer's narrow one
    ],
)
def test_tiles_cut_from_the_end(length, blocks, narrow):
    assert tiles.pairs_of_cuda_sm90(text(length)) == 64 * (64 * blocks + 16 * narrow)


def test_packed_heads_share_blocks():
    """Four heads, 16 positions a consumer: the last 32 positions of 64 see one block each."""
    assert tiles.pairs_of_cuda_sm90(text(32), packed_heads=4) == 2 * 64 * 64 // 4


@pytest.mark.parametrize("packed_heads", [1, 2, 4, 32])
@pytest.mark.parametrize("name", SIZES["tiny"].shapes)
def test_nothing_visible_is_left_out(name, packed_heads):
    layout = SIZES["tiny"].shapes[name].layout("cpu")
    assert tiles.pairs_of_cuda_sm90(layout, packed_heads) >= layout.pairs()
