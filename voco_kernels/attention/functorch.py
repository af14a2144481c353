"""Support for ``torch.func`` transforms (grad, vjp, jacrev and vmap) of the attention operator.

``torch.library`` operators with a registered backward reject these transforms; an
``autograd.Function`` with ``setup_context`` and a vmap rule doesn't. The vmap rule is a loop that
calls the operator once per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from voco_kernels.attention.autograd import attention_backward, attention_forward


def is_transforming() -> bool:
    """Whether a ``torch.func`` transform is active, outside ``torch.compile``."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class TransformableAttention(torch.autograd.Function):
    """``attention_forward`` with the same arguments and results."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, *layout_tensors, scale, backend, deterministic = inputs
        ctx.save_for_backward(q, k, v, *output, *layout_tensors)
        ctx.options = scale, backend, deterministic

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return *_TransformableBackward.apply(dout, dlse, *ctx.saved_tensors, *ctx.options), *(
            None,
        ) * 10

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(TransformableAttention.apply, info.batch_size, in_dims, inputs)


class _TransformableBackward(torch.autograd.Function):
    """``attention_backward``; there is no second derivative."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            "expected first derivatives of masked_attention, got a derivative of its gradient, which "
            "no backend has; use torch.nn.functional.scaled_dot_product_attention with "
            "attn_mask=layout.materialize()[:, None] and the math backend"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_TransformableBackward.apply, info.batch_size, in_dims, inputs)


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = [
        function(
            *(
                value if dim is None else value.select(dim, sample).contiguous()
                for value, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for sample in range(batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
