"""Tests of argument validation: errors give names and numbers, before anything is computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voco_kernels import MaskLayout, masked_attention

LAYOUT = MaskLayout.from_lengths(6, 1, 4, batch=2)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def arguments(q=(2, 4, 11, 8), k=(2, 2, 11, 8), v=(2, 2, 11, 8), layout=LAYOUT, **options):
    tensors = [shape if isinstance(shape, torch.Tensor) else tensor(*shape) for shape in (q, k, v)]
    return (*tensors, layout), options


WRONG = {
    "rows that are not contiguous": (
        arguments(q=torch.zeros(2, 4, 8, 11).mT),
        ValueError,
        r"q with a contiguous last dimension, got strides .*call q.contiguous\(\)",
    ),
    "layout of another length": (
        arguments(layout=MaskLayout.from_lengths(6, 1, 5, batch=2)),
        ValueError,
        "batch 2 and length 12, got batch 2 and length 11",
    ),
    "layout of another batch": (
        arguments(layout=MaskLayout.from_lengths(6, 1, 4, batch=3)),
        ValueError,
        "batch 3 and length 11, got batch 2 and length 11",
    ),
    "layout on another device": (
        arguments(layout=LAYOUT.to("meta")),
        ValueError,
        "q on the layout's device meta, got cpu",
    ),
    "k on another device": (
        arguments(k=tensor(2, 2, 11, 8, device="meta")),
        ValueError,
        "k on the layout's device cpu, got meta",
    ),
    "a mask in place of the layout": (
        arguments(layout=LAYOUT.materialize()),
        TypeError,
        "a MaskLayout, got Tensor",
    ),
    "three dimensions": (arguments(q=(4, 11, 8)), ValueError, r"q as \[batch.*got \[4, 11, 8\]"),
    "k of another length": (
        arguments(k=(2, 2, 10, 8)),
        ValueError,
        r"\[2, kv_heads, 11, 8\].*k \[2, 2, 10, 8\]",
    ),
    "v of another head_dim": (
        arguments(v=(2, 2, 11, 16)),
        ValueError,
        r"\[2, kv_heads, 11, 8\].*v \[2, 2, 11, 16\]",
    ),
    "v of other heads": (arguments(v=(2, 1, 11, 8)), ValueError, r"v \[2, 1, 11, 8\]"),
    "k of another batch": (
        arguments(k=(1, 2, 11, 8), v=(1, 2, 11, 8)),
        ValueError,
        r"k \[1, 2, 11, 8\]",
    ),
    "heads that don't divide": (
        arguments(q=(2, 5, 11, 8)),
        ValueError,
        "divisible by the number of key/value heads, got 5 and 2",
    ),
    "no key/value heads": (
        arguments(k=(2, 0, 11, 8), v=(2, 0, 11, 8)),
        ValueError,
        "key/value heads, got 4 and 0",
    ),
    "no head_dim": (
        arguments(q=(2, 4, 11, 0), k=(2, 2, 11, 0), v=(2, 2, 11, 0), scale=1.0),
        ValueError,
        r"head_dim >= 1.*\[2, 4, 11, 0\]",
    ),
    "mixed dtypes": (
        arguments(v=tensor(2, 2, 11, 8, dtype=torch.bfloat16)),
        TypeError,
        "torch.float32, torch.float32, torch.bfloat16",
    ),
    "integers": (
        arguments(*(tensor(2, 2, 11, 8, dtype=torch.int32),) * 3),
        TypeError,
        "floating-point.*torch.int32",
    ),
    "scale of 0": (arguments(scale=0.0), ValueError, "scale > 0, got 0.0"),
    "negative scale": (arguments(scale=-0.5), ValueError, "scale > 0, got -0.5"),
    "scale that is no number": (arguments(scale=math.nan), ValueError, "scale > 0, got nan"),
    "infinite scale": (arguments(scale=math.inf), ValueError, "scale > 0, got inf"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call, error, message):
    positional, options = call
    with pytest.raises(error, match=f"(?s)expected.*{message}"):
        masked_attention(*positional, **options)


def test_no_head_dim_with_the_default_scale():
    positional, _ = arguments(q=(2, 4, 11, 0), k=(2, 2, 11, 0), v=(2, 2, 11, 0))
    with pytest.raises(ValueError, match="head_dim >= 1"):
        masked_attention(*positional)


def test_right_arguments_pass():
    positional, options = arguments(scale=0.5)
    out, lse = masked_attention(*positional, **options, return_lse=True)
    assert out.shape == (2, 4, 11, 8) and lse.shape == (2, 4, 11)
    assert lse.dtype == torch.float32


def test_forward_mode_is_refused_rather_than_dropped():
    (q, k, v, layout), _ = arguments()
    with pytest.raises(NotImplementedError, match="forward-mode tangents"):
        torch.func.jvp(lambda q: masked_attention(q, k, v, layout), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        masked_attention(q, k, v, layout)  # a level without tangents is fine


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=(2, 0, 11, 8)), ValueError, "positive number of query heads.*got 0 and 2"),
        (dict(scale="a"), TypeError, "scale as a number, got str 'a'"),
        (dict(deterministic=1), TypeError, "deterministic as a bool, got int 1"),
    ],
)
def test_no_heads_and_no_number(change, error, message):
    positional, options = arguments(**change)
    with pytest.raises(error, match=message):
        masked_attention(*positional, **options)


def test_dtypes_that_no_backend_computes_in_are_listed():
    q = torch.zeros(2, 2, 11, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        RuntimeError, match="float64, float32, float16, bfloat16, got float8_e4m3fn"
    ):
        masked_attention(q, q, q, LAYOUT)


def test_scale_of_numpy_and_of_no_number():
    q = torch.randn(2, 4, 11, 8, generator=torch.Generator().manual_seed(0))
    expected = masked_attention(q, q, q, LAYOUT, scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(masked_attention(q, q, q, LAYOUT, scale=scale), expected)
    assert torch.equal(
        masked_attention(q, q, q, LAYOUT, scale=np.int64(2)),
        masked_attention(q, q, q, LAYOUT, scale=2),
    )
    with pytest.raises(TypeError, match="scale as a number, got bool True"):
        masked_attention(q, q, q, LAYOUT, scale=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_on_meta_tensors(autocast):
    """As in SDPA, outputs and gradients have shapes and dtypes, but no values."""
    q = torch.empty(2, 4, 11, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k = torch.empty(2, 2, 11, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        out, lse = masked_attention(q, k, k, LAYOUT.to("meta"), return_lse=True)
    out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)
    ids = torch.empty(2, 11, dtype=torch.long, device="meta")
    layout = MaskLayout.from_input_ids(ids, voco_token_id=5)
    assert masked_attention(q, k, k, layout).shape == q.shape


def test_a_backend_that_needs_data_refuses_meta_in_words():
    q = torch.empty(2, 4, 11, 8, device="meta")
    with pytest.raises(RuntimeError, match="expected tensors on cpu or cuda.*got meta"):
        masked_attention(q, q, q, LAYOUT.to("meta"), backend="sdpa")
