"""Tests of the emulation's results against torch."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda_on_cpu.build import compile_for_cpu, why_not
from tests.cuda_on_cpu.calls import (
    KERNELS,
    check,
    gather,
    gemm,
    is_gathered,
    is_product,
    library,
    pointer,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ORDERS = (0, 1, 2)  # thread 0 first, the last first, a random order


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["kk", "km", "mk", "mm", "rk", "rm"])
@pytest.mark.parametrize("n", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemm(dtype, n, form, order):
    """Has rows outside of the tensor, a partial tile of K, and phases that continue across tiles."""
    lib = library("gemm")
    lib.emulation_order(order)
    a, b = torch.randn(320, 200).to(dtype), torch.randn(n, 200).to(dtype)
    c, message = gemm(lib, a, b, form)
    check(message)
    assert is_product(c, a, b)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_blocks_share_the_tiles(blocks):
    lib = library("gemm")
    lib.emulation_order(0)
    lib.emulation_multiprocessors(blocks)
    a, b = torch.randn(500, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    c, message = gemm(lib, a, b)
    lib.emulation_multiprocessors(2)
    check(message)
    assert is_product(c, a, b)


@pytest.mark.parametrize("order", range(6))
def test_gathered_rows_and_turns(order):
    lib = library("gather")
    lib.emulation_order(order)
    q, keys = torch.randn(64, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    rows = torch.randint(-1, 100, (5 * 64,), dtype=torch.int32)
    out, message = gather(lib, q, keys, rows)
    check(message)
    assert is_gathered(out, q, keys, rows)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes(order):
    lib = library("lanes")
    lib.emulation_order(order)
    answers = torch.full((10, 96), -1, dtype=torch.int32)
    int_sum, ticket = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    float_sum = torch.ones(3)
    check(lib.lanes(pointer(answers), pointer(int_sum), pointer(ticket), pointer(float_sum)))

    thread = torch.arange(96)
    lane, warp = thread % 32, thread // 32 * 32
    expected = [
        warp + 5,
        thread // 8 * 8 + (thread + 1) % 8,
        thread ^ 3,
        torch.where(lane % 16 >= 2, thread - 2, thread),
        torch.where(lane % 16 < 14, thread + 2, thread),
        thread ^ 16,
        torch.full_like(thread, sum(1 << lane for lane in range(0, 32, 3))),
        warp == 32,
        warp >= 32,
        torch.where(lane < 16, sum(range(16)), sum(range(16, 32))),
    ]
    assert torch.equal(answers.long(), torch.stack([row.long() for row in expected]))
    assert int_sum.item() == sum(range(96)) and ticket.item() == 96
    assert float_sum.tolist() == [96, 2 * 96, 96 / 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers(dtype):
    """Converts every 16-bit number both ways, all ties between two of them, and random bits."""
    lib = library("lanes")
    lib.emulation_order(0)
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every, next_one = bits.view(dtype).float(), (bits + 1).view(dtype).float()
    anything = torch.randint(-(2**31), 2**31, (2**17,)).to(torch.int32).view(torch.float32)
    numbers = torch.cat([every, every / 2 + next_one / 2, anything])
    pairs = torch.stack([numbers, numbers.flip(0)], 1).contiguous()
    packed = torch.empty(pairs.shape, dtype=dtype)
    unpacked, powers = torch.empty_like(pairs), torch.empty_like(pairs)
    outputs = (pointer(tensor) for tensor in (packed, unpacked, powers))
    check(lib.numbers(dtype == torch.bfloat16, pointer(pairs), *outputs, pairs.shape[0]))

    torch.testing.assert_close(packed, pairs.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(unpacked, packed.float(), rtol=0, atol=0, equal_nan=True)
    # Subnormals are zeros, as on the GPU; otherwise the C library's results, off by 2 ulp at most.
    flushed = torch.where(pairs.abs() < torch.finfo(torch.float32).tiny, pairs * 0, pairs).double()
    exp2, log2 = torch.exp2(flushed[:, 0]).float(), torch.log2(flushed[:, 1]).float()
    exp2[exp2 < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(powers[:, 0], exp2, rtol=2**-22, atol=0, equal_nan=True)
    torch.testing.assert_close(powers[:, 1], log2, rtol=2**-22, atol=0, equal_nan=True)


def test_every_library_has_settings_of_its_own():
    one, other = library("gather"), library("lanes")
    assert ctypes.cast(one.emulation_order, ctypes.c_void_p).value != (
        ctypes.cast(other.emulation_order, ctypes.c_void_p).value
    )


def test_compiles_once():
    source = [KERNELS / "lanes.cu"]
    built = compile_for_cpu(source, "lanes")
    when = built.stat().st_mtime_ns
    assert compile_for_cpu(source, "lanes") == built and built.stat().st_mtime_ns == when
    assert [path.name for path in built.parent.iterdir() if path.is_dir()] == []


def test_says_what_the_compiler_said(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("int f() { return missing; }")
    with pytest.raises(RuntimeError, match="missing.* was not declared in this scope"):
        compile_for_cpu([source], "broken")
