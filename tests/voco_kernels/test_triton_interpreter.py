"""Tests of the repaired Triton interpreter, which must compute what a GPU does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: requirements/triton.txt has it"
)

import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)


@triton.jit
def product_kernel(A, B, C, blocks, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([N, N], tl.float32)
    for block in range(0, tl.load(blocks)):
        offset = block * N * N + row * N + column
        total = tl.dot(tl.load(A + offset), tl.load(B + offset), total)
    tl.store(C + row * N + column, total.to(C.dtype.element_ty))


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot_and_a_loop_to_a_loaded_bound(dtype, result):
    a, b = (torch.randn(3, 16, 16).to(dtype) for _ in range(2))
    c = torch.empty(16, 16, dtype=result)
    product_kernel[(1,)](a, b, c, torch.tensor([3], dtype=torch.int32), N=16)
    a, b = a.double(), b.double()
    exact, terms = (a @ b).sum(0), 3 * 16
    # One rounding for each term of the sum, and half of the result's last bit.
    bound = terms * 2.0**-24 * (a.abs() @ b.abs()).sum(0)
    if result == torch.bfloat16:
        bound += 2.0**-8 * exact.abs() * (1 + 2.0**-8)
    assert ((c - exact).abs() <= bound).all()


@triton.jit
def cast_kernel(X, Y, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(Y + index, tl.load(X + index).to(Y.dtype.element_ty))


def test_rounds_to_the_nearest_bfloat16_and_ties_to_even():
    x = torch.randn(1024)
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, float("inf"), float("nan"), 3.4e38])
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=1024)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
