"""Block shapes for each kernel, head_dim and dtype."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """``block_m`` queries by ``block_n`` keys, warps a program, stages of the load pipeline, and how
    float32 operands are multiplied (16-bit ones ignore it)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


def config(kernel: str, head_dim: int, itemsize: int, capability: int) -> Config:
    """The configuration that ships.

    Args:
        kernel: ``"forward"``, ``"dq"`` or ``"dkdv"``.
        head_dim: D; 1 to 256.
        itemsize: bytes of a q, k, v element.
        capability: ``10 * major + minor`` of the device's compute capability.
    """
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if itemsize == 4:
        return _FLOAT32[kernel, width]
    table = {90: _HOPPER, 100: _BLACKWELL}.get(capability, _PORTABLE)
    return table[kernel, width]


# 64-row blocks leave room for two programs on a multiprocessor: one computes while the other waits.
_HOPPER = {
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(64, 64, 4, 3),
    ("forward", 256): Config(64, 64, 8, 2),
    ("dq", 64): Config(64, 64, 4, 3),
    ("dq", 128): Config(64, 64, 4, 2),
    ("dq", 256): Config(64, 64, 8, 2),
    ("dkdv", 64): Config(64, 64, 4, 3),
    ("dkdv", 128): Config(32, 64, 4, 3),
    # Two accumulators of width 256 and wgmma's 64 rows would spill: 32 rows, on mma.sync.
    ("dkdv", 256): Config(32, 32, 8, 2),
}

# Fits the 99 KiB of shared memory of sm_86, sm_89 and sm_120 as well as sm_80's 163 KiB.
_PORTABLE = {
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(128, 64, 8, 2),
    ("forward", 256): Config(64, 32, 8, 2),
    ("dq", 64): Config(64, 32, 4, 2),
    ("dq", 128): Config(64, 32, 8, 2),
    ("dq", 256): Config(32, 32, 8, 1),
    ("dkdv", 64): Config(32, 64, 4, 2),
    ("dkdv", 128): Config(32, 64, 8, 2),
    ("dkdv", 256): Config(32, 32, 8, 1),
}

# Only compiled, never timed; the portable dkdv would spill here.
_BLACKWELL = _PORTABLE | {("dkdv", 128): Config(32, 64, 8, 1)}

# float32 is for checking, not for speed. Three tf32 products keep its accuracy on tensor cores; 32 rows
# keep it off wgmma, with which 64 x 16 blocks read out of bounds (Triton 3.6 on an H200).
_FLOAT32 = {
    ("forward", 64): Config(32, 32, 4, 2, "tf32x3"),
    ("forward", 128): Config(32, 16, 8, 1, "tf32x3"),
    ("forward", 256): Config(32, 16, 8, 1),
    ("dq", 64): Config(32, 32, 4, 1, "tf32x3"),
    ("dq", 128): Config(32, 16, 8, 1, "tf32x3"),
    ("dq", 256): Config(16, 16, 4, 1),
    ("dkdv", 64): Config(32, 32, 4, 1, "tf32x3"),
    ("dkdv", 128): Config(16, 16, 8, 1, "tf32x3"),
    ("dkdv", 256): Config(16, 16, 8, 1),
}
