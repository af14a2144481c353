"""Repairs of Triton 3.6's interpreter where its results differ from a GPU's.

* It stores bfloat16 as the bits of a uint16, and ``tl.dot`` multiplies those as integers.
* It truncates float32 to bfloat16; a GPU rounds to nearest, ties to even.
* NumPy 2.4 converts only 0-dimensional arrays to int; the interpreter's scalars have one dimension.

One repair is for speed. The interpreter patches ``triton.language`` at every call from one
``@triton.jit`` function to another, although the launch has already done so, which takes a third of a
test's time.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Replace functions of the interpreter for the rest of the process."""
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
    """The bits of the rounded values, uint16. Before the lower 16 bits are dropped, 0x8000 is added, or
    0x7FFF if the last remaining bit is even: the sum carries exactly if the value rounds up."""
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
        # triton.language's own functions refer to its module core, ours to the package
        seen = [
            module for module in function.__globals__.values() if module is tl or module is tl.core
        ]
        already = not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if already else patch_lang(function)

    return patched
