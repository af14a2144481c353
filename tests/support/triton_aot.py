"""Compile the shipped Triton kernels for any GPU, without needing one, and inspect the machine code.

``python tests/support/triton_aot.py 90 bf16 64 128`` prints one JSON object per kernel and head_dim.
Tests run it in a new process because theirs uses Triton's interpreter, which can't compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from voco_kernels.attention.backends.triton import backward_kernels as triton_backward
from voco_kernels.attention.backends.triton import forward_kernel as triton_forward
from voco_kernels.attention.backends.triton.config import Config, config
from voco_kernels.layout.schedule import TILE

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "dq": triton_backward.dq_kernel,
    "dkdv": triton_backward.dkdv_kernel,
}
TENSORS = {"Q", "K", "V", "Out", "DOut", "DQ", "DK", "DV"}
STATISTICS = {"Lse", "Delta"}
INDICES = {
    "query_tiles",
    "key_tiles",
    "counts",
    "kept_positions",
    "reader_positions",
    "visible_from",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel's resources: registers per thread, bytes of stack per thread (spills, except for
    ``config.CALL_STACK``), bytes of shared memory per program, loads from local memory (each spill
    has one), and warpgroup matrix instructions."""

    registers: int
    stack: int
    shared: int
    local_loads: int
    hgmma: int


def compile_kernel(
    kernel: str, dtype: str, head_dim: int, blocks: Config, capability: int
) -> Binary:
    """Compile with the specialization of real calls: aligned pointers and strides.

    Args:
        kernel: a key of ``KERNELS``.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        capability: 80, 90, ...
    """
    function = KERNELS[kernel]
    constants = dict(
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
        TILE=TILE,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        PRECISION=blocks.precision,
    )
    tma = capability >= 90 and dtype != "fp32"
    if not tma:
        constants |= {name: None for name in function.arg_names if name.endswith("_desc")}
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = _type_of(name, dtype, constants, tma)
        if signature[name].startswith("*") or name.startswith("stride"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(
            function,
            signature,
            {(function.arg_names.index(name),): value for name, value in constants.items()},
            aligned,
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
    )
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared)


def _type_of(name: str, dtype: str, constants: dict, tma: bool) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_desc"):
        rows = constants["BLOCK_N" if name in ("k_desc", "v_desc") else "BLOCK_M"]
        return f"tensordesc<{dtype}[1, 1, {rows}, {constants['BLOCK_D']}]>" if tma else "constexpr"
    if name in TENSORS:
        return f"*{dtype}"
    if name in STATISTICS:
        return "*fp32"
    if name in INDICES:
        return "*i32"
    return "fp32" if name == "scale" else "i32"


def _inspect(cubin: bytes, shared: int) -> Binary:
    usage = _ask(cubin, "cuobjdump", "--dump-resource-usage")
    code = disassemble(cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.M)
    count = Counter(opcodes)
    return Binary(registers, stack, shared, count["LDL"], count["HGMMA"])


def disassemble(cubin: bytes) -> str:
    return _ask(cubin, "nvdisasm", "-c")


def _ask(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(TOOLS / tool), option, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(capability: int, dtype: str, head_dims: list[int]) -> None:
    for head_dim in head_dims:
        for kernel in KERNELS:
            blocks = config(kernel, head_dim, 4 if dtype == "fp32" else 2, capability)
            binary = compile_kernel(kernel, dtype, head_dim, blocks, capability)
            print(json.dumps(dict(kernel=kernel, head_dim=head_dim, **asdict(binary))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], [int(head_dim) for head_dim in sys.argv[3:]])
