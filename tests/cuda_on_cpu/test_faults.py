"""Tests that the emulation detects faults, planted in correct kernels or launched one by one."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.cuda_on_cpu.build import why_not
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

ORDERS = (0, 1, 2)
OVERWRITTEN = "written between wgmma and wgmma_wait"
# The expected message, or None if the result is NaN. A fault's effect depends on the threads' order.
GEMM_FAULTS = {
    "NO_FULL_WAIT": f"{OVERWRITTEN}|more than its 1 arrivals",
    "NO_EMPTY_WAIT": f"{OVERWRITTEN}|more than its 1 arrivals",
    "PARITY": f"{OVERWRITTEN}|more than its 1 arrivals",
    "FEW_BYTES": OVERWRITTEN + r"|deadlock: .* \(0 of 1 arrivals and -\d+ bytes pending",
    "MANY_BYTES": r"deadlock: .* \(0 of 1 arrivals and 16 bytes pending",
    "EARLY_RELEASE": OVERWRITTEN,
    "EARLY_READ": None,
    "NO_WGMMA_FENCE": "wgmma without wgmma_fence",
}
GATHER_FAULTS = {
    "NO_FENCE_AFTER_STORE": "was written by thread 2.. without fence_async_proxy",
    "NO_FENCE_AFTER_COPY": "was written by thread .* without fence_async_proxy",
    "NO_COPY_WAIT": "was written by thread .* without fence_async_proxy|" + OVERWRITTEN,
    "NO_TURNS": "named barrier .: arrived twice before the 256 threads had met",
}


@pytest.mark.parametrize("fault", GEMM_FAULTS)
def test_faults_in_gemm(fault):
    lib = library("gemm", "ONE_FORM_ONLY", f"FAULT_{fault}")
    a, b = torch.randn(320, 200).bfloat16(), torch.randn(64, 200).bfloat16()
    for order in ORDERS:
        lib.emulation_order(order)
        c, message = gemm(lib, a, b)
        if GEMM_FAULTS[fault] is None:
            assert message is None and c.isnan().all() and not is_product(c, a, b)
        else:
            assert re.search(GEMM_FAULTS[fault], (message or b"").decode())


@pytest.mark.parametrize("fault", GATHER_FAULTS)
def test_faults_in_gather(fault):
    lib = library("gather", f"FAULT_{fault}")
    q, keys = torch.randn(64, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    rows = torch.randint(-1, 100, (5 * 64,), dtype=torch.int32)
    for order in ORDERS:
        lib.emulation_order(order)
        out, message = gather(lib, q, keys, rows)
        assert not is_gathered(out, q, keys, rows)
        assert re.search(GATHER_FAULTS[fault], (message or b"").decode())


MISTAKES = {
    "TOO_MANY_ARRIVALS": r"thread 0: mbarrier at 0x\w+: more than its 1 arrivals .* 16 bytes",
    "MISALIGNED_BARRIER": "expected a multiple of 8",
    "BARRIER_NOT_INITIALISED": "not initialised, or overwritten",
    "BARRIER_OVERWRITTEN": "not initialised, or overwritten",
    "BARRIER_INITIALISED_TWICE": "initialised twice",
    "BARRIER_NOT_VISIBLE_TO_COPIES": "thread 0, which initialised it, .* barrier_init_fence",
    "WAIT_FOR_NOBODY": r"block 0: deadlock: 128 of 256 threads wait, no copy is in flight; "
    r"128 \(first: thread 128\) for mbarrier at 0x\w+ parity 0 \(1 of 1 arrivals and 0 bytes",
    "WAIT_FOR_NO_BYTES": r"deadlock: 256 of 256 .* \(0 of 1 arrivals and 16 bytes pending\)",
    "TOO_FEW_AT_NAMED_BARRIER": r"named barrier 3 \(128 of 256 threads have arrived\)",
    "NAMED_BARRIER_COUNTS_DIFFER": "named barrier 1: for .* threads here, for .* where others",
    "NAMED_BARRIER_TWICE": "arrived twice before the 64 threads had met",
    "NAMED_BARRIER_ODD_COUNT": "expected a multiple of 32 .*, got 100",
    "NAMED_BARRIER_IN_VAIN": "named barrier 2: at the end of the block, 32 of 64 threads",
    "LANE_MISSING": r"31 \(first: thread 32\) for lanes of warp 1 with mask 0xffffffff",
    "LANES_DIFFER": "__syncwarp .* other lanes wait in __shfl|__shfl.* other lanes wait in __syncw",
    "LANE_OUTSIDE_MASK": "__shfl_sync: from lane 20, which is not in the mask",
    "OUTSIDE_OF_SHARED_MEMORY": "4 bytes are outside of the launch's 32768",
    "POINTER_BEHIND_SHARED_MEMORY": "written 3 bytes after the 32768 bytes",
    "COPY_MISALIGNED": "tma_load to 0x480: the swizzle needs a multiple of 1024",
    "COPY_IN_FLIGHT_AT_THE_END": "the block has ended while 1 tma_loads are in flight",
    "COPY_OVER_UNFENCED_STORE": "tma_load: .* written by thread 0 without fence_async_proxy",
    "CP_ASYNC_MISALIGNED": "cp_async_16 from .*: expected a multiple of 16",
    "CP_ASYNC_WITHOUT_WAIT": "thread 0 returned without cp_async_wait_all",
    "WGMMA_WITHOUT_FENCE": "wgmma without wgmma_fence",
    "WGMMA_WITHOUT_COMMIT": "the block has ended without wgmma_wait for 1 products",
    "WGMMA_DESCRIPTORS_DIFFER": "not the instruction that other threads",
    "WGMMA_WITHOUT_SWIZZLE": "expected swizzle mode 1 .*, got 0",
    "WGMMA_BETWEEN_PATTERNS": "expected it to start in the first row of a swizzle pattern",
    "WGMMA_OF_PART_OF_A_WARPGROUP": r"96 \(first: thread 0\) for wgmma_wait in all threads",
    "WGMMA_ACCUMULATORS_WRITTEN": "wrote to its accumulators while a product was in flight",
    "ADD_MISALIGNED": "expected a multiple of 8",
    "TOO_MANY_REGISTERS": "the threads hold 65536 registers in the end, the block has 65280",
}
NUMBERS = re.findall(r"^  ([A-Z_]+),$", (KERNELS / "misuse.cu").read_text(), re.M)


def misuse(lib: ctypes.CDLL, number: int) -> bytes | None:
    tensor, scratch = torch.randn(8, 64).bfloat16(), torch.zeros(64)
    return lib.misuse(number, pointer(tensor), pointer(scratch))


@pytest.mark.parametrize("mistake", NUMBERS)
def test_mistakes(mistake):
    """Each is reported, and the next launch starts in a clean state."""
    lib = library("misuse")
    for order in ORDERS:
        lib.emulation_order(order)
        message = misuse(lib, NUMBERS.index(mistake))
        assert re.search(MISTAKES[mistake], (message or b"").decode())
        check(misuse(lib, -1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"offset": 4}, "an address that is a multiple of 16"),
        ({"box": (72, 8, 1, 1, 1)}, "at most 128 bytes, got 144"),
        ({"box": (20, 8, 1, 1, 1)}, "a multiple of 16 bytes, got 40"),
        ({"box": (64, 257, 1, 1, 1)}, "a box of 1 to 256 elements in dimension 1, got 257"),
        ({"box": (64, 8, 1, 1, 0)}, "a box of 1 to 256 elements in dimension 4, got 0"),
        ({"sizes": (64, 8, 0, 1, 1)}, "a size of 1 to 2.32 in dimension 2, got 0"),
        ({"strides": (128, 1000, 1024, 1024)}, "multiple of 16 .* in dimension 2, got 1000"),
    ],
)
def test_maps_that_the_driver_refuses(change, message):
    tensor = torch.zeros(8, 64, dtype=torch.bfloat16)
    sizes = (ctypes.c_uint64 * 5)(*change.get("sizes", (64, 8, 1, 1, 1)))
    strides = (ctypes.c_uint64 * 4)(*change.get("strides", (128, 1024, 1024, 1024)))
    box = (ctypes.c_uint32 * 5)(*change.get("box", (64, 8, 1, 1, 1)))
    address = ctypes.c_void_p(tensor.data_ptr() + change.get("offset", 0))
    got = library("misuse").map_of(address, *(ctypes.byref(each) for each in (sizes, strides, box)))
    assert (got is None) if message is None else re.search(message, got.decode())


@pytest.mark.parametrize(
    "threads, shared_bytes, message",
    [
        (256, 232448, None),
        (1025, 32768, "1 to 1024 threads, got 1025"),
        (256, 232449, "at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_launches_that_the_driver_refuses(threads, shared_bytes, message):
    got = library("misuse").launch_of(threads, shared_bytes)
    assert (got is None) if message is None else re.search(message, got.decode())
