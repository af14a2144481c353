"""Tests of the flash-attn backend's packing, with a stand-in for the package."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.voco_kernels.cases import CASES
from tests.voco_kernels.oracle import (
    Results,
    assert_close_to_truth,
    plant_nan_in_padding,
    poisoned_memory,
    random_inputs,
)
from voco_kernels import MaskLayout
from voco_kernels.attention.backends import flash_attn


def attend_to_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, scale):
    """Attention within each sequence, with the causal mask aligned to the last query and the last key,
    in float64 and differentiable. Returns out ``[tokens, H, D]`` and lse ``[H, tokens]``."""
    outs, lses = [], []
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert starts_q[-1] == len(q) and starts_k[-1] == len(k)
    for i in range(len(starts_q) - 1):
        queries, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(
            scores.shape[2] - scores.shape[1] + 1
        )
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (q, k, v))
    for starts, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert starts.dtype == torch.int32 and starts.diff().max() == longest
        assert starts.diff().min() > 0


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
):
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and dropout_p == 0
    out, lse = attend_to_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return out.to(q.dtype), lse.float(), None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
):
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and deterministic and (dropout_p, softcap, alibi_slopes) == (0, 0, None)
    assert (window_size_left, window_size_right) == (-1, -1)
    with torch.enable_grad():
        inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
        again, lse = attend_to_sequences(*inputs, cu_seqlens_q, cu_seqlens_k, softmax_scale)
        gradients = torch.autograd.grad(again, inputs, dout.double())
    assert (out - again).abs().max() < 0.05 and (softmax_lse - lse).abs().max() < 0.05
    assert out.shape == q.shape and softmax_lse.is_contiguous()
    for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
        buffer.copy_(gradient)


@pytest.fixture
def package(monkeypatch):
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_parity_around_a_stand_in(package, name, with_dlse):
    layout = CASES[name].layout()
    inputs = random_inputs(layout, torch.bfloat16)
    poisoned = plant_nan_in_padding(inputs, layout)
    scale, dlse = 0.2, poisoned.dlse if with_dlse else None
    with poisoned_memory():
        out, lse = flash_attn.forward(*poisoned[:3], layout, scale)
        gradients = flash_attn.backward(poisoned.dout, dlse, *poisoned[:3], out, lse, layout, scale)
    if not with_dlse:
        inputs = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    assert_close_to_truth(Results(out, lse, *gradients), inputs, layout, scale)


def test_a_layout_is_packed_once_and_anew_when_it_changes(package, monkeypatch):
    packed = []
    build = flash_attn._build_packing
    monkeypatch.setattr(
        flash_attn, "_build_packing", lambda layout: packed.append(layout) or build(layout)
    )
    layout = CASES["padded left"].layout()
    inputs = random_inputs(layout, torch.bfloat16)
    for _ in range(3):
        flash_attn.forward(*inputs[:3], layout, 0.2)
    assert len(packed) == 1

    other = MaskLayout.from_lengths(9, 1, layout.length - 10, batch=layout.batch)
    for ours, theirs in zip(layout.tensors(), other.tensors(), strict=True):
        ours.copy_(theirs)
    out, _ = flash_attn.forward(*inputs[:3], layout, 0.2)
    expected, _ = flash_attn.forward(*inputs[:3], other, 0.2)
    assert len(packed) == 3 and torch.equal(out, expected)

    with torch.inference_mode():  # tensors have no version counter
        written = CASES["padded left"].layout()
        flash_attn.forward(*inputs[:3], written, 0.2)
        for ours, theirs in zip(written.tensors(), other.tensors(), strict=True):
            ours.copy_(theirs)
        out, _ = flash_attn.forward(*inputs[:3], written, 0.2)
    assert torch.equal(out, expected)


def test_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn.flash_attn_interface", raising=False)
    (reason,) = flash_attn.missing()
    assert "flash-attn" in reason and "pip install 'voco-kernels[flash-attn]'" in reason


def test_names_a_broken_installation(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("flash_attn"):
                raise ImportError("undefined symbol: _ZN3c105")

    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "undefined symbol: _ZN3c105" in flash_attn.missing()[0]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, "expected bfloat16, float16, got float32"),
        (torch.float16, 264, "up to 256, got 264"),
        (torch.float16, 60, "multiple of 8.*got 60"),
    ],
)
def test_says_what_it_does_not_support(dtype, head_dim, reason):
    q = torch.zeros(1, 2, 5, head_dim, dtype=dtype)
    reasons = flash_attn.unsupported(q, q, q)
    assert any("expected tensors on CUDA, got cpu" in text for text in reasons)
    assert any(re.search(reason, text) for text in reasons)


def test_a_batch_of_padding_only_needs_no_call():
    rows = torch.zeros(2, 5).long()
    layout = MaskLayout.from_input_ids(rows, voco_token_id=1, attention_mask=rows)
    q = torch.randn(2, 2, 5, 16)
    out, lse = flash_attn.forward(q, q, q, layout, 1.0)
    assert out.eq(0).all() and lse.isneginf().all()
    gradients = flash_attn.backward(q, None, q, q, q, out, lse, layout, 1.0)
    assert all(gradient.eq(0).all() for gradient in gradients)
