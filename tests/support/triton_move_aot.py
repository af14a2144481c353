"""Compile the Triton loader's kernel for any GPU, without needing one.

``python tests/support/triton_move_aot.py 90`` prints one JSON object per variant. It runs in a new
process, like ``triton_aot.py``, whose inspection of machine code it uses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.triton_aot import _inspect, disassemble
from voco_kernels.kv.loaders.triton import OPTIONS, constants
from voco_kernels.kv.loaders.triton_kernel import move_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
# to_cache, is_copy, entry_dtype, cache_dtype, head_dim, rotary_dim, interleaved
VARIANTS = [
    (False, True, FP32, FP32, 80, 0, False),
    (True, False, INT8, FP16, 96, 96, True),
    (True, False, E4M3, BF16, 128, 128, False),
]
MORE_VARIANTS = [
    (True, True, BF16, BF16, 128, 0, False),
    (True, False, BF16, BF16, 64, 64, False),
    (True, False, BF16, BF16, 128, 128, False),
    (True, False, FP16, FP32, 256, 256, False),
]
NUMBERS = ("num_layers", "num_kv_heads", "num_entries")
WIDE_NUMBERS = ("head_stride", "length")


def compile_variant(variant: tuple, capability: int):
    """Compile with all tables and, as in ``triton.run``, no assumptions about their alignment."""
    values = constants(*variant)
    if not values["ROTARY_DIM"]:
        values["inv_freq"] = None
    signature = {}
    for name in move_kernel.arg_names:
        signature[name] = "constexpr" if name in values else "*i64"
        if name in NUMBERS or name in WIDE_NUMBERS:
            signature[name] = "i32" if name in NUMBERS else "i64"
    if "inv_freq" not in values:
        signature["inv_freq"] = "*fp64"
    indexed = {(move_kernel.arg_names.index(name),): value for name, value in values.items()}
    return triton.compile(
        ASTSource(move_kernel, signature, indexed, {}),
        target=GPUTarget("cuda", capability, 32),
        options=OPTIONS,
    )


def main(capability: int) -> None:
    for variant in VARIANTS + (MORE_VARIANTS if capability in (80, 90) else []):
        compiled = compile_variant(variant, capability)
        binary = _inspect(compiled.asm["cubin"], compiled.metadata.shared)
        code = disassemble(compiled.asm["cubin"])
        bits = 8 * min(16, 8 * variant[2].itemsize)
        wide = {
            "wide_loads": code.count(f"LDG.E.EF.{bits}"),
            "wide_stores": code.count("STG.E.128"),
        }
        name = " ".join(str(kind).removeprefix("torch.") for kind in variant)
        print(json.dumps(dict(kernel=name, **wide, **asdict(binary))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
