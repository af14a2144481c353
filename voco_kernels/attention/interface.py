"""``masked_attention``: ``scaled_dot_product_attention`` under a ``MaskLayout``."""

from __future__ import annotations

from torch import Tensor

from voco_kernels.attention.autograd import attention_forward
from voco_kernels.attention.dispatch import choose
from voco_kernels.attention.functorch import TransformableAttention, is_transforming
from voco_kernels.attention.validation import cast_for_autocast, validate
from voco_kernels.layout import MaskLayout


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: MaskLayout,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + mask) v`` under the layout's mask, differentiable, never dense.

    Works under ``torch.compile(fullgraph=True)``, autocast, gradient checkpointing, ``torch.func``
    (first derivatives in reverse mode; vmap calls it once for each sample) and, with the ``triton`` and
    ``cuda_sm90`` backends, CUDA graphs; the others ask the host for the layout's runs.

    Args:
        q: ``[B, Hq, S, D]``, any strides with a contiguous last dimension.
        k: ``[B, Hkv, S, D]``, same dtype as q; ``Hkv`` divides ``Hq`` (grouped-query attention).
        v: shaped as k.
        layout: of the same B, S and device. Packed documents are ``B = 1``.
        scale: of the scores, > 0; ``1 / sqrt(D)`` by default.
        backend: a name in ``voco_kernels.backends()``. That one runs, or the call fails with its
            reasons. By default the first that can serve on q's device.
        return_lse: also return the log of the softmax's denominator, differentiable as well.
        deterministic: the same inputs give the same gradients, bit for bit. With False, and unless
            ``torch.use_deterministic_algorithms`` forbids it, a backend may add in any order where that
            is faster; ``cuda_sm90`` then does so for head_dim above 64.

    Returns:
        out ``[B, Hq, S, D]`` in q's dtype; 0 in padding rows. With ``return_lse`` also lse, float32
        (float64 for float64 inputs) ``[B, Hq, S]``, natural log; -inf in padding rows.

    Raises:
        TypeError, ValueError: arguments that don't fit together.
        RuntimeError: no backend, or not the named one, can serve; the message has all reasons.
    """
    q, k, v = cast_for_autocast(q, k, v)
    validate(q, k, v, layout, scale, deterministic)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose(q, k, v, backend)
    attend = TransformableAttention.apply if is_transforming() else attention_forward
    out, lse = attend(q, k, v, *layout.tensors(), scale, backend, deterministic)
    return (out, lse) if return_lse else out
