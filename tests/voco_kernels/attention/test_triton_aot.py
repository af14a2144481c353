"""Tests of every shipped Triton configuration, compiled ahead of time for its GPU.

There must be no spills, shared memory must be within the GPU's limit (which the compiler doesn't check),
and on Hopper there must be warpgroup instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from voco_kernels.attention.backends.triton.config import (
    CALL_STACK,
    SHARED_LIMIT,
    Config,
    chip_of,
    config,
    width_of,
)
from voco_kernels.attention.backends.triton.table import TABLE
from voco_kernels.layout.schedule import TILE

COMPILER = Path(__file__).parents[2] / "support" / "triton_aot.py"
KERNELS = ("forward", "dq", "dkdv")
WIDTHS = (64, 128, 256)
# Too narrow for wgmma's 64 rows; docs/tuning.md explains why.
WITHOUT_WGMMA = {("dkdv", 256)}

COMPILED = [  # the slowest first
    (80, "fp32", WIDTHS),
    (90, "fp32", WIDTHS),
    (80, "bf16", (64, 80, 96, 128, 256)),
    (90, "bf16", (64, 80, 96, 128, 256)),
    (89, "bf16", WIDTHS),
    (100, "bf16", WIDTHS),
    (120, "bf16", WIDTHS),
    # like bf16 except for the instructions' types
    (80, "fp16", (128,)),
    (90, "fp16", (128,)),
]


@pytest.mark.parametrize(("chip", "dtype", "head_dims"), COMPILED)
def test_kernels_compile_without_spills(chip, dtype, head_dims):
    pytest.importorskip("triton", reason="Triton is not installed: requirements/triton.txt has it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(COMPILER.parents[2])
    done = subprocess.run(
        [sys.executable, COMPILER, str(chip), dtype, *map(str, head_dims)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 3 * len(head_dims)
    for kernel in kernels:
        assert kernel["stack"] <= CALL_STACK.get(chip, 0), f"spills: {kernel}"
        assert kernel["local_loads"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[chip], f"too much shared memory: {kernel}"
        if (
            chip == 90
            and dtype != "fp32"
            and (kernel["kernel"], kernel["head_dim"]) not in WITHOUT_WGMMA
        ):
            assert kernel["hgmma"] > 0, f"no warpgroup matrix instructions: {kernel}"


def test_the_table_has_every_kernel_and_width_and_all_of_it_is_compiled():
    compiled = {chip: set(head_dims) for chip, dtype, head_dims in COMPILED if dtype == "bf16"}
    assert set(TABLE) == set(SHARED_LIMIT) == set(compiled)
    for chip, rows in TABLE.items():
        assert set(rows) == {(kernel, width) for kernel in KERNELS for width in WIDTHS}
        assert set(WIDTHS) <= compiled[chip]
        for block_m, block_n, num_warps, num_stages, origin in rows.values():
            assert TILE % block_m == TILE % block_n == 0 and num_warps in (4, 8) and num_stages > 0
            assert origin == "compiled" or origin.startswith("NVIDIA")


def test_config_looks_up_the_width_and_the_chip():
    assert [width_of(head_dim) for head_dim in (1, 64, 80, 96, 128, 129, 256)] == [
        64,
        64,
        128,
        128,
        128,
        256,
        256,
    ]
    assert config("forward", 80, 2, 90) == Config(*TABLE[90]["forward", 128][:4])
    # unknown compute capabilities use the table for 99 KiB of shared memory; FP32 has one table for all
    assert [chip_of(c) for c in (80, 86, 87, 89, 90, 100, 103, 120, 121, 130)] == [
        80,
        89,
        80,
        89,
        90,
        100,
        100,
        120,
        120,
        89,
    ]
    assert config("dq", 128, 4, 90) == config("dq", 128, 4, 120)
    assert config("dq", 128, 4, 90).precision == "tf32x3"
