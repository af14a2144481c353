"""Block shapes for each kernel, head_dim and dtype."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """``block_m`` queries by ``block_n`` keys, warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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
    return (_HOPPER if capability == 90 else _PORTABLE)[kernel, width]


_HOPPER = {
    ("forward", 64): Config(128, 128, 4, 3),
    ("forward", 128): Config(128, 64, 8, 3),
    ("forward", 256): Config(128, 64, 8, 2),
    ("dq", 64): Config(128, 64, 4, 3),
    ("dq", 128): Config(128, 64, 8, 3),
    ("dq", 256): Config(64, 32, 8, 2),
    ("dkdv", 64): Config(64, 128, 4, 3),
    ("dkdv", 128): Config(32, 128, 8, 3),
    ("dkdv", 256): Config(32, 64, 8, 2),
}

# Fits the 99 KiB of shared memory of sm_86, sm_89 and sm_120 as well as sm_80's 163 KiB.
_PORTABLE = {
    ("forward", 64): Config(128, 64, 4, 3),
    ("forward", 128): Config(128, 64, 8, 2),
    ("forward", 256): Config(64, 32, 8, 2),
    ("dq", 64): Config(64, 64, 4, 2),
    ("dq", 128): Config(64, 32, 8, 2),
    ("dq", 256): Config(32, 32, 8, 1),
    ("dkdv", 64): Config(64, 64, 4, 2),
    ("dkdv", 128): Config(32, 64, 8, 2),
    ("dkdv", 256): Config(32, 32, 8, 1),
}

_FLOAT32 = {
    ("forward", 64): Config(64, 32, 4, 2),
    ("forward", 128): Config(32, 32, 4, 2),
    ("forward", 256): Config(32, 16, 8, 1),
    ("dq", 64): Config(32, 32, 4, 1),
    ("dq", 128): Config(32, 32, 8, 1),
    ("dq", 256): Config(16, 16, 8, 1),
    ("dkdv", 64): Config(32, 32, 4, 1),
    ("dkdv", 128): Config(16, 32, 8, 1),
    ("dkdv", 256): Config(16, 16, 8, 1),
}
