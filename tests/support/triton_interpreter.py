"""Triton's interpreter, put right where Triton 3.6's computes something else than a GPU.

* It keeps bfloat16 as the bits of a uint16, and ``tl.dot`` multiplies those as integers.
* It cuts float32 off to bfloat16; a GPU rounds to nearest, ties to even.
* NumPy 2.4 turns only arrays of no dimension into an int; the interpreter's scalars have one.

One thing only takes time: the interpreter patches ``triton.language`` again for every call from one
``@triton.jit`` function to another, a third of a test's time, though the launch has patched it already.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Replace the interpreter's functions, for the rest of this process."""
    builder = InterpreterBuilder
    if builder.create_dot is _create_dot:
        return
    builder.create_dot = _create_dot
    builder.cast_impl = _rounding(builder.cast_impl)
    builder.create_fp_to_fp = _rounding(builder.create_fp_to_fp)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _create_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    dtype = accumulator.data.dtype
    product = np.matmul(_values(a).astype(dtype), _values(b).astype(dtype))
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _values(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    assert not handle.dtype.scalar.is_fp8(), "expected no float8 in a tl.dot, which is not repaired"
    return handle.data


def _rounding(convert):
    def converted(self, source, target, *rounding_mode):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(_round_to_bfloat16(source.data), tl.bfloat16)
        return convert(self, source, target, *rounding_mode)

    return converted


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16. Half of what is cut off, added before, carries where it should round up;
    one less where the last bit that stays is even, so that ties go there."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_bit = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + last_bit) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _with_index(patch_tensor):
    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    return patched


def _once_a_launch(patch_lang):
    def patched(function):
        # triton.language's own functions see its module core, ours see the package
        seen = [
            module for module in function.__globals__.values() if module is tl or module is tl.core
        ]
        already = not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if already else patch_lang(function)

    return patched
