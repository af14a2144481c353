"""Every shipped Triton configuration, compiled ahead of time: no spills, shared memory within the chip's
limit (the compiler does not check it), warpgroup instructions on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: requirements/triton.txt has it")

COMPILER = Path(__file__).parents[1] / "triton_aot.py"
# Bytes of shared memory a program may have: 163, 227 and 227 KiB.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Too narrow for wgmma's 64 rows: see triton_config.py.
WITHOUT_WGMMA = {("dkdv", 256)}


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dims"),
    [
        (80, "bf16", (64, 80, 96, 128, 256)),
        (90, "bf16", (64, 80, 96, 128, 256)),
        (80, "fp16", (64, 128, 256)),
        (90, "fp16", (64, 128, 256)),
        (80, "fp32", (64, 128, 256)),
        (90, "fp32", (64, 128, 256)),
        (100, "bf16", (128,)),
    ],
)
def test_kernels_compile_without_spills(capability, dtype, head_dims):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(COMPILER.parents[1])
    done = subprocess.run(
        [sys.executable, COMPILER, str(capability), dtype, *map(str, head_dims)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 3 * len(head_dims)
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["local_loads"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[capability], f"too much shared memory: {kernel}"
        if (
            capability == 90
            and dtype != "fp32"
            and (kernel["kernel"], kernel["head_dim"]) not in WITHOUT_WGMMA
        ):
            assert kernel["hgmma"] > 0, f"no warpgroup matrix instructions: {kernel}"
