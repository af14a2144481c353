"""Tests of masked_attention with torch.func, which its error for forward mode recommends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from voco_kernels import MaskLayout, masked_attention

LAYOUT = MaskLayout.from_spans(
    [[("vision", 5), ("voco", 2), ("text", 6)], [("text", 4)]], padding_side="left"
)


def inputs(*more: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*more, 2, heads, LAYOUT.length, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = masked_attention(q, k, v, LAYOUT, return_lse=True)
    return out.square().sum() + lse[0].sin().sum()


def gradients(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(loss(*tensors), tensors)


def test_grad_and_vjp():
    expected = gradients(inputs())
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*inputs()), expected)
    value, pull_back = torch.func.vjp(loss, *inputs())
    assert value == loss(*inputs())
    torch.testing.assert_close(pull_back(torch.ones_like(value)), expected)


def test_jacrev_of_what_forward_mode_refuses():
    q, k, v = inputs()

    def first_column(q):
        return masked_attention(q, k, v, LAYOUT)[0, 0, :, 0]

    with pytest.raises(NotImplementedError, match=r"backward, or torch.func.grad outside"):
        torch.func.jacfwd(first_column)(q)
    expected = torch.autograd.functional.jacobian(first_column, q)
    torch.testing.assert_close(torch.func.jacrev(first_column)(q), expected)


def test_vmap_and_gradients_of_each_sample():
    samples = inputs(3)
    each = [list(sample) for sample in zip(*samples, strict=True)]
    out = torch.stack([masked_attention(*sample, LAYOUT) for sample in each])
    torch.testing.assert_close(
        torch.vmap(lambda *qkv: masked_attention(*qkv, LAYOUT))(*samples), out
    )
    expected = [torch.stack(parts) for parts in zip(*map(gradients, each), strict=True)]
    found = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*samples)
    torch.testing.assert_close(list(found), expected)


def test_one_tensor_shared_by_all_samples():
    q, k, v = inputs()
    several = torch.stack([q, 2 * q], dim=2)
    out = torch.vmap(lambda q: masked_attention(q, k, v, LAYOUT), in_dims=2)(several)
    torch.testing.assert_close(out[1], masked_attention(2 * q, k, v, LAYOUT))


def test_second_derivatives_are_refused_with_what_works():
    q, k, v = (tensor[:1] for tensor in inputs())
    layout = MaskLayout.from_spans([[("vision", 5), ("voco", 2), ("text", 6)]])

    def ours(q):
        return masked_attention(q, k, v, layout).square().sum()

    def advised(q):
        with sdpa_kernel(SDPBackend.MATH):
            mask = layout.materialize()[:, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.square().sum()

    def twice(function):
        return torch.func.grad(lambda q: torch.func.grad(function)(q).square().sum())

    with pytest.raises(NotImplementedError, match="scaled_dot_product_attention with attn_mask="):
        twice(ours)(q)
    torch.testing.assert_close(torch.func.grad(advised)(q), torch.func.grad(ours)(q))
    assert twice(advised)(q).abs().max() > 0
