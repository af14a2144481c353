"""``masked_attention``: scaled dot-product attention with a ``MaskLayout`` as its mask."""

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
    """Compute ``softmax(scale * q k^T + mask) v`` with the layout's mask.

    Differentiable. Works with ``torch.compile(fullgraph=True)``, autocast, gradient checkpointing and
    ``torch.func`` (first derivatives in reverse mode; vmap makes one call per sample). The ``triton``
    and ``cuda_sm90`` backends also work in CUDA graphs; the others read the layout on the host.

    Args:
        q: ``[B, Hq, S, D]``; any strides, as long as the last dimension is contiguous.
        k: ``[B, Hkv, S, D]``, same dtype as q; ``Hkv`` divides ``Hq`` (grouped-query attention).
        v: shaped as k.
        layout: the mask, with the same B, S and device. For packed documents, ``B = 1``.
        scale: factor applied to the scores, > 0; ``1 / sqrt(D)`` by default.
        backend: a name from ``voco_kernels.backends()``. If that backend can't serve the call, it
            fails and says why. By default, the first backend that can serve on q's device.
        return_lse: also return the log of the softmax denominator, which is differentiable too.
        deterministic: the same inputs give the same gradients, bit for bit. If False, and unless
            ``torch.use_deterministic_algorithms`` forbids it, a backend may sum in any order where that
            is faster; ``cuda_sm90`` does so for head_dim above 64.

    Returns:
        out ``[B, Hq, S, D]`` in q's dtype; 0 for padding queries. With ``return_lse``, also lse
        ``[B, Hq, S]``, natural log, float32 (float64 for float64 inputs); -inf for padding queries.

    Raises:
        TypeError, ValueError: the arguments are invalid or don't fit together.
        RuntimeError: the named backend can't serve the call, or none can; the message lists every
            reason.
    """
    q, k, v = cast_for_autocast(q, k, v)
    validate(q, k, v, layout, scale, deterministic)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose(q, k, v, backend)
    attend = TransformableAttention.apply if is_transforming() else attention_forward
    out, lse = attend(q, k, v, *layout.tensors(), scale, backend, deterministic)
    return (out, lse) if return_lse else out
