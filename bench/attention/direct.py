"""Calls a backend's own functions on a case, without autograd and with nothing else on the device."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from bench.attention.peers import ANY_ORDER, Case
from voco_kernels.attention import dispatch

OWN_KERNELS = ("cuda_sm90", "triton")
"""Backends with kernels of our own, the least tried first."""


def choose(case: Case, name: str | None) -> str:
    """The named backend, or the first of ``OWN_KERNELS`` that can serve, or the device's default.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't serve; the message says why.
    """
    tensors = (case.q, case.k, case.v)
    if name is None:
        for candidate in OWN_KERNELS:
            backend = dispatch.load(candidate)
            if not (backend.missing() or backend.unsupported(*tensors)):
                return candidate
    return dispatch.choose(*tensors, name)


def forward(backend: ModuleType, case: Case) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, S, D]`` and ``lse [B, Hq, S]``."""
    return backend.forward(case.q, case.k, case.v, case.layout, case.q.shape[-1] ** -0.5)


def backward(
    backend: ModuleType,
    case: Case,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq``, ``dk`` and ``dv``, of the shapes of q, k and v. ``dlse [B, Hq, S]``, like lse."""
    scale = case.q.shape[-1] ** -0.5
    return backend.backward(
        case.dout, dlse, case.q, case.k, case.v, out, lse, case.layout, scale, deterministic
    )


def orders(name: str) -> tuple[bool, ...]:
    """The values of ``deterministic`` with which to call a backend, to run all of its kernels."""
    return (True, False) if name in ANY_ORDER else (True,)
