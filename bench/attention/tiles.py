"""How much of what a kernel multiplies is visible: the arithmetic of tiles, without a clock.

A tile of queries multiplies with whole blocks of keys, so on the diagonal and at the ends of runs it
computes pairs that the mask hides. Their share decides what a kernel of a given speed can reach.
"""

from __future__ import annotations

from voco_kernels import MaskLayout


def runs(layout: MaskLayout) -> list[tuple[int, int, int]]:
    """``(start, stop, first_key)`` of each run that sees anything (``docs/schedule.md``): its queries,
    and where its keys begin if the gathered ones are put right before the contiguous ones."""
    found = []
    for _, start, stop, key_start, prefix_start, prefix_stop, *_ in layout.schedule.host_runs():
        if key_start < stop:
            found.append((start, stop, key_start - (prefix_stop - prefix_start)))
    return found


def pairs_of_two_calls(layout: MaskLayout, tile: int = 128) -> int:
    """Pairs that causal calls of their own for each run execute with tiles of ``tile`` queries and keys,
    cut from the run's start: what FlashAttention-3 does at head_dim 128."""
    total = 0
    for start, stop, first_key in runs(layout):
        for row in range(start, stop, tile):
            keys = min(row + tile, stop) - first_key
            total += tile * tile * -(-keys // tile)
    return total


def pairs_of_cuda_sm90(layout: MaskLayout, packed_heads: int = 1) -> int:
    """Pairs a head that ``csrc/attention_forward_sm90.cu`` executes, by the rules of ``csrc/tiles.cuh``.

    Args:
        packed_heads: how many heads that share keys lie side by side in a tile, a power of two.
    """
    positions = 64 // packed_heads  # of a consumer; two have a tile
    total = 0
    for start, stop, first_key in runs(layout):
        for end in range(stop, start, -2 * positions):
            blocks = -(-(end - first_key) // 64)
            narrow = first_key - (end - 64 * blocks) >= 48
            for last in (end - positions - 1, end - 1):
                mine = blocks - (end - 1 - last) // 64 if last >= start else 0
                if mine > 0:
                    total += 64 * (64 * mine - (48 if narrow else 0))
    return total // packed_heads
