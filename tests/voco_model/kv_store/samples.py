"""Small entries for the stores' tests, and their exact comparison."""

from __future__ import annotations

import torch

from voco_kernels.kv.entry import CompactKV, Rope


def make_entry(
    number: int,
    *,
    tokens: int = 1,
    layers: int = 2,
    dtype=torch.bfloat16,
    fingerprint: str = "model-a",
) -> CompactKV:
    """A small entry that depends on ``number``, with the key ``make_key(number)``."""
    generator = torch.Generator().manual_seed(number)
    kv = torch.randn(layers, 2, 2, tokens, 16, generator=generator)
    positions = torch.arange(5, 5 + tokens)
    rope = Rope(10_000.0 ** -(torch.arange(8) / 8))
    entry = CompactKV(
        kv, positions, 5 + tokens, rope=rope, fingerprint=fingerprint, key=make_key(number)
    )
    return entry.quantize(dtype) if dtype.itemsize == 1 else entry.to(dtype=dtype)


def make_key(number: int) -> str:
    return f"{number:064x}"


def assert_same(got: CompactKV | None, expected: CompactKV) -> None:
    """Checks that two entries agree in every field and bit."""
    assert got is not None, "a miss"
    assert got.dtype == expected.dtype
    assert got.kv.shape == expected.kv.shape
    assert torch.equal(got.kv.view(torch.uint8), expected.kv.view(torch.uint8))
    assert (got.scales is None) == (expected.scales is None)
    if expected.scales is not None:
        assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.positions, expected.positions)
    assert got.next_position == expected.next_position
    assert (got.rope is None) == (expected.rope is None)
    assert got.rope is None or got.rope.same(expected.rope)
    assert (got.fingerprint, got.key) == (expected.fingerprint, expected.key)
