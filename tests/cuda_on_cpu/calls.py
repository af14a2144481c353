"""Functions that call the kernels in ``kernels/`` with tensors, and return errors as messages."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from tests.cuda_on_cpu.build import compile_for_cpu

KERNELS = Path(__file__).parent / "kernels"
EXPORTED = {
    "gemm": ["gemm"],
    "gather": ["gather"],
    "lanes": ["lanes", "numbers"],
    "misuse": ["misuse", "map_of", "launch_of"],
}


@functools.cache
def library(name: str, *defines: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compile_for_cpu([KERNELS / f"{name}.cu"], name, defines)))
    for function in EXPORTED[name]:
        getattr(loaded, function).restype = ctypes.c_char_p
    return loaded


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def check(message: bytes | None) -> None:
    assert message is None, message.decode()


def gemm(
    lib: ctypes.CDLL, a: torch.Tensor, b: torch.Tensor, form: str = "kk"
) -> tuple[torch.Tensor, bytes | None]:
    """A [m, k] times the transpose of B [n, k]; ``form`` gives the layout of each (see gemm.cu)."""
    (m, k), n = a.shape, b.shape[0]
    a, b = (
        matrix.t().contiguous() if layout == "m" else matrix
        for matrix, layout in zip((a, b), form, strict=True)
    )
    c = torch.full((m, n), torch.inf)
    is_bf16 = a.dtype == torch.bfloat16
    tensors = pointer(a), pointer(b), pointer(c)
    return c, lib.gemm(is_bf16, n, form.encode(), *tensors, m, k, a.stride(0), b.stride(0))


def is_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Products of two 16-bit numbers are exact in float32; each of their k sums rounds once."""
    a, b = a.double(), b.double()
    bound = a.shape[1] * 2.0**-24 * (a.abs() @ b.abs().t())
    return bool(((c - a @ b.t()).abs() <= bound).all())


def gather(
    lib: ctypes.CDLL, q: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, bytes | None]:
    """q is [64, 64], keys [any, 64], and rows [64 * tiles], indices of keys or -1 (see gather.cu)."""
    out = torch.zeros(64, 64)
    tensors = pointer(q), pointer(keys), pointer(rows), pointer(out)
    return out, lib.gather(*tensors, rows.numel() // 64)


def is_gathered(out: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor) -> bool:
    """Errors are those of a product's sums of 64, plus one rounding of each turn's sum."""
    q, keys = q.double(), torch.cat([keys, torch.zeros(1, 64)]).double()
    expected, magnitude, bound = torch.zeros(3, 64, 64, dtype=torch.float64)
    for tile in rows.long().split(64):
        product, sizes = q @ keys[tile].t(), q.abs() @ keys[tile].abs().t()
        expected, magnitude = expected / 2 + product, magnitude / 2 + sizes
        bound = bound / 2 + 2.0**-24 * (64 * sizes + magnitude)
    return bool(((out - expected).abs() <= bound).all())
