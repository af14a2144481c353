"""Tests of the choice of a backend, and of the reasons given if one can't serve."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from voco_kernels import MaskLayout, backends, masked_attention
from voco_kernels.attention.backends.triton import launch
from voco_kernels.attention.dispatch import BACKENDS, PREFERENCE, choose, load

LAYOUT = MaskLayout.from_lengths(6, 1, 4)


def tensors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.zeros(1, 2, 11, 16, dtype=dtype, device=device) for _ in range(3)]


@pytest.fixture
def say_no(monkeypatch):
    """``say_no("sdpa", "its reason")`` makes a backend unable to serve."""

    def refuse(name: str, reason: str) -> None:
        monkeypatch.setattr(load(name), "unsupported", lambda q, k, v: [reason])

    return refuse


def test_reasons_of_every_backend():
    reasons = backends()
    assert list(reasons) == list(BACKENDS)
    assert reasons["sdpa"] == reasons["reference"] == []
    if find_spec("triton") is not None:
        assert reasons["triton"] == [], "it runs on a GPU, and in tests in the interpreter"
    if find_spec("flash_attn") is None:
        assert "pip install 'voco-kernels[flash-attn]'" in reasons["flash_attn"][0]


def test_triton_says_that_it_is_missing(monkeypatch):
    monkeypatch.setattr(launch, "_INSTALLED", False)
    assert "triton is not installed" in backends()["triton"][0]
    with pytest.raises(RuntimeError, match="triton is not installed"):
        masked_attention(*tensors(), LAYOUT, backend="triton")


def test_preference():
    assert choose(*tensors()) == "sdpa"
    assert PREFERENCE["cuda"] == ("triton", "flash_attn", "sdpa", "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_preference_on_cuda(dtype):
    assert choose(*tensors(dtype, "cuda")) == "triton"


@pytest.mark.gpu
def test_sdpa_refuses_float64_on_cuda():
    with pytest.raises(
        RuntimeError, match="sdpa: expected bfloat16, float16, float32, got float64"
    ):
        choose(*tensors(torch.float64, "cuda"), "sdpa")
    assert choose(*tensors(torch.float64, "cuda")) == "reference"


def test_next_in_line_serves(say_no):
    say_no("sdpa", "a reason")
    assert choose(*tensors()) == "reference"


def test_named_backend_never_falls_back(say_no, monkeypatch):
    say_no("sdpa", "tensors too blue")
    monkeypatch.setattr(load("sdpa"), "forward", lambda *_: pytest.fail("called all the same"))
    monkeypatch.setattr(load("reference"), "forward", lambda *_: pytest.fail("fell back"))
    with pytest.raises(RuntimeError) as error:
        masked_attention(*tensors(), LAYOUT, backend="sdpa")
    assert "backend 'sdpa' can't serve q [1, 2, 11, 16]" in str(error.value)
    assert "sdpa: tensors too blue" in str(error.value)
    assert "reference" not in str(error.value)


def test_one_error_lists_all_reasons(say_no):
    say_no("sdpa", "the first reason")
    say_no("reference", "the second reason")
    with pytest.raises(RuntimeError) as error:
        masked_attention(*tensors(), LAYOUT)
    assert "sdpa: the first reason" in str(error.value)
    assert "reference: the second reason" in str(error.value)


def test_unknown_name():
    with pytest.raises(ValueError, match="expected a backend among triton, .*, got 'cudnn'"):
        masked_attention(*tensors(), LAYOUT, backend="cudnn")


@pytest.mark.parametrize("backend", ["sdpa", "triton", "flash_attn"])
def test_last_dimension_with_gaps(backend):
    q, k, v = tensors()
    gaps = torch.zeros(1, 2, 11, 32)[..., ::2]
    reasons = "; ".join(load(backend).unsupported(q, gaps, v))
    assert "expected q, k and v with a contiguous last dimension, got strides" in reasons
    assert "(704, 352, 32, 2)" in reasons
    assert choose(q, gaps, v) == "reference"


def test_the_named_backend_is_the_one_that_runs(monkeypatch):
    for name in ("sdpa", "reference"):
        called = []
        forward = load(name).forward
        with monkeypatch.context() as patch:
            patch.setattr(
                load(name), "forward", lambda *a, f=forward, c=called: c.append(1) or f(*a)
            )
            masked_attention(*tensors(), LAYOUT, backend=name)
        assert called


def test_a_device_of_no_backend_but_the_reference():
    (reason,) = load("sdpa").unsupported(*tensors(device="meta"))
    assert "cpu or cuda" in reason and "got meta" in reason
    assert choose(*tensors(device="meta")) == "reference"


def test_tokens_too_far_apart_for_int32_offsets_are_refused_by_triton():
    """Its kernels compute offsets within a tile in int32, which larger strides would overflow."""
    far = torch.empty_strided((1, 2, 11, 16), (16, 16, 2**24, 1), device="meta")
    near = torch.empty_strided((1, 2, 11, 16), (16, 16, 2**24 - 1, 1), device="meta")
    message = "expected token strides below 16777216 elements"
    assert any(message in reason for reason in load("triton").unsupported(near, far, near))
    assert not any(message in reason for reason in load("triton").unsupported(near, near, near))
