"""Error bounds for attention: twice the error of eager attention in the same dtype, plus 1e-5.

The exact results are those of the reference backend in float64. The bound applies separately to the
largest error of out, of lse and of each gradient with respect to q, k and v, for random gradients of out
and lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from voco_kernels import MaskLayout, masked_attention
from voco_kernels.attention.dispatch import load


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The inputs in another dtype; dlse in the dtype that lse then has."""
        wide = torch.promote_types(dtype, torch.float32)
        return Inputs(*(tensor.to(dtype) for tensor in self[:4]), self.dlse.to(wide))


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def random_inputs(
    layout: MaskLayout,
    dtype: torch.dtype,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator(layout.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=layout.device, dtype=torch.float64)

    batch, length = layout.batch, layout.length
    q, dout = (normal(batch, heads, length, head_dim) for _ in range(2))
    k, v = (normal(batch, kv_heads, length, head_dim) for _ in range(2))
    return Inputs(q, k, v, dout, normal(batch, heads, length)).to(dtype)


def skip_unless_it_serves(backend: str, inputs: Inputs) -> None:
    module = load(backend)
    reasons = module.missing() or module.unsupported(*inputs[:3])
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def attend(
    inputs: Inputs,
    layout: MaskLayout,
    backend: str,
    scale: float | None = None,
    deterministic: bool = True,
) -> Results:
    """Run forward and backward through the public function."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    out, lse = masked_attention(
        q,
        k,
        v,
        layout,
        scale=scale,
        backend=backend,
        return_lse=True,
        deterministic=deterministic,
    )
    gradients = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    return Results(out.detach(), lse.detach(), *gradients)


def assert_close_to_truth(
    results: Results, inputs: Inputs, layout: MaskLayout, scale: float | None = None
) -> None:
    """Assert the bounds above, and that padding is exactly 0, or -inf in lse.

    ``inputs`` gave ``results``, except that their padding must be finite here.
    """
    truth = attend(inputs.to(torch.float64), layout, "reference", scale)
    eager = attend(inputs, layout, "reference", scale)
    padding = (layout.visible_until == 0)[:, None, :].expand(inputs.q.shape[:3])
    for name, ours, exact, rounded in zip(Results._fields, results, truth, eager, strict=True):
        assert ours.dtype == rounded.dtype and ours.shape == exact.shape, name
        where = padding[:, : exact.shape[1]]
        nothing = float("-inf") if name == "lse" else 0.0
        assert (ours[where] == nothing).all(), f"{name} is not {nothing} in padding"
        error = (ours.double() - exact)[~where].abs().amax().item()
        allowed = 2 * (rounded.double() - exact)[~where].abs().amax().item() + 1e-5
        assert error <= allowed, f"{name} is off by {error:.3g}, where {allowed:.3g} is allowed"


def plant_nan_in_padding(inputs: Inputs, layout: MaskLayout) -> Inputs:
    padding = (layout.visible_until == 0)[:, None, :]
    return Inputs(
        *(tensor.masked_fill(padding[..., None], torch.nan) for tensor in inputs[:4]),
        inputs.dlse.masked_fill(padding, torch.nan),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
