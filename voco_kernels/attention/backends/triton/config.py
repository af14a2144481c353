"""Block sizes and compiler options of the Triton kernels, by head_dim, dtype and GPU."""

from __future__ import annotations

from typing import NamedTuple

from voco_kernels.attention.backends.triton.table import TABLE


class Config(NamedTuple):
    """A kernel's block of ``block_m`` queries by ``block_n`` keys, its warps per program, the stages of
    its load pipeline, and the precision of float32 products (ignored for 16-bit operands)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Maximum bytes of shared memory per program, by compute capability; Triton checks it at launch."""

CALL_STACK = {120: 8}
"""Bytes of stack per thread that are not spills, by compute capability. On sm_120 each TMA load
includes a call into the driver for addresses in another multiprocessor's memory, never used here."""

# Compute capabilities without entries in TABLE use those of one with the same matrix instructions and
# no more shared memory. Unknown ones use the entries that need the least shared memory.
_SISTERS = {86: 89, 87: 80, 103: 100, 121: 120}
_LEAST = 89


def config(kernel: str, head_dim: int, itemsize: int, capability: int) -> Config:
    """The shipped configuration for a kernel. It is looked up, never autotuned, so first calls are fast.

    Args:
        kernel: ``"forward"``, ``"dq"`` or ``"dkdv"``.
        head_dim: D; 1 to 256.
        itemsize: bytes per element of q, k and v.
        capability: ``10 * major + minor`` of the device's compute capability.
    """
    width = width_of(head_dim)
    if itemsize == 4:
        return _FLOAT32[kernel, width]
    block_m, block_n, num_warps, num_stages, _ = TABLE[chip_of(capability)][kernel, width]
    return Config(block_m, block_n, num_warps, num_stages)


def width_of(head_dim: int) -> int:
    """The width whose configurations serve a head_dim: 64, 128 or 256 (e.g. 128 for 80 and 96)."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def chip_of(capability: int) -> int:
    """The compute capability in ``TABLE`` whose entries are used for this one."""
    return capability if capability in TABLE else _SISTERS.get(capability, _LEAST)


# float32 is meant for checking results, so one untuned table serves every GPU. Three tf32 products give
# float32 accuracy on tensor cores. With at most 32 rows, wgmma is not used: with it, blocks of 64 x 16
# read out of bounds (Triton 3.6 on an H200).
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
