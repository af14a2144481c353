"""Compile the layout kernels for any GPU, without needing one.

``python tests/support/triton_layout_aot.py 90`` prints one JSON object per kernel. It runs in a new
process, like ``triton_aot.py``, whose inspection of machine code it uses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.triton_aot import Binary, _inspect
from voco_kernels.layout import triton as triton_layout
from voco_kernels.layout import triton_kernels

TYPES = {"ids": "*i64", "position_ids": "*i64", "stray": "*i1"}
NUMBERS = {"voco_token_id", "image_token_id", "batch", "length", "chunks"}


def compile_kernel(kernel, constants: dict, types: dict[str, str], capability: int) -> Binary:
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "i32" if name in NUMBERS else TYPES.get(name, "*i32")
        signature[name] = "constexpr" if name in constants else types.get(name, kind)
        if signature[name].startswith("*"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            aligned,
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=triton_layout.num_warps(constants["BLOCK"]), num_stages=1),
    )
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared)


def main(capability: int) -> None:
    def report(name: str, kernel, constants: dict, types: dict[str, str]) -> None:
        binary = compile_kernel(kernel, constants, types, capability)
        print(json.dumps(dict(kernel=name, **constants, **asdict(binary))), flush=True)

    variants = [
        (1, 3, 1024, 1),
        (1, 3, 2048, 1),
        (1, 1, 1024, 64),
        (2, 2, 1024, 64),
        (3, 3, 1024, 64),
    ]
    for first, last, block, width in variants:
        constants = dict(
            FIRST_STAGE=first, LAST_STAGE=last, BLOCK=block, WIDTH=width, ISOLATED=True
        )
        report("analyse", triton_kernels.analyse_kernel, constants, {"attention_mask": "*i64"})
        if width == 1:
            constants |= dict(ISOLATED=False, position_ids=None, image_token_id=None)
            report("analyse", triton_kernels.analyse_kernel, constants, {"attention_mask": "*i1"})
    for block, width in ((1024, 1), (2048, 1), (1024, 64)):
        report("emit", triton_kernels.emit_kernel, dict(BLOCK=block, WIDTH=width), {})


if __name__ == "__main__":
    main(int(sys.argv[1]))
