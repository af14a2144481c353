"""The blocks of each Triton kernel: which are used for a head_dim, a dtype and a chip."""

from __future__ import annotations

from typing import NamedTuple

from voco_kernels.attention.backends.triton.table import TABLE


class Config(NamedTuple):
    """``block_m`` queries by ``block_n`` keys, warps a program, stages of the load pipeline, and how
    float32 operands are multiplied (16-bit ones ignore it)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program may have, by chip. Triton checks it at the first launch."""

CALL_STACK = {120: 8}
"""Bytes of stack a thread that are no spill, by chip: on sm_120 each TMA load comes with a call into
the driver for addresses in another multiprocessor's memory, which ours never are."""

# Chips without rows of their own borrow those of a sister with the same matrix instructions and no
# more shared memory; the ones that nobody has heard of yet, those that need the least.
_SISTERS = {86: 89, 87: 80, 103: 100, 121: 120}
_LEAST = 89


def config(kernel: str, head_dim: int, itemsize: int, capability: int) -> Config:
    """The configuration that ships. Never timed here: a first call is no place for autotuning.

    Args:
        kernel: ``"forward"``, ``"dq"`` or ``"dkdv"``.
        head_dim: D; 1 to 256.
        itemsize: bytes of a q, k, v element.
        capability: ``10 * major + minor`` of the device's compute capability.
    """
    width = width_of(head_dim)
    if itemsize == 4:
        return _FLOAT32[kernel, width]
    block_m, block_n, num_warps, num_stages, _ = TABLE[chip_of(capability)][kernel, width]
    return Config(block_m, block_n, num_warps, num_stages)


def width_of(head_dim: int) -> int:
    """The class of a head_dim: 64, 128 or 256; 80 and 96 are of class 128."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def chip_of(capability: int) -> int:
    """The chip of the table that stands for a compute capability."""
    return capability if capability in TABLE else _SISTERS.get(capability, _LEAST)


# float32 is for checking, not for speed: one table for every chip, and not tuned. Three tf32 products
# keep its accuracy on tensor cores; 32 rows keep it off wgmma, with which 64 x 16 blocks read out of
# bounds (Triton 3.6 on an H200).
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
