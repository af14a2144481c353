"""A backend's own functions on a case: no autograd around them, and nothing else on the device."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from bench.peers import Case
from voco_kernels import dispatch

MOST_IN_NEED = ("cuda_sm90", "triton")
"""Backends with kernels of our own, those first that a tool should look at first."""


def choose(case: Case, name: str | None) -> str:
    """The named backend, or the first of ``MOST_IN_NEED`` that can serve, or the device's default.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't serve; the message says why.
    """
    tensors = (case.q, case.k, case.v)
    if name is None:
        for candidate in MOST_IN_NEED:
            backend = dispatch.BACKENDS.get(candidate)
            if backend and not (backend.missing() or backend.unsupported(*tensors)):
                return candidate
    return dispatch.choose(*tensors, name)


def forward(backend: ModuleType, case: Case) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, S, D]`` and ``lse [B, Hq, S]``."""
    return backend.forward(case.q, case.k, case.v, case.layout, case.q.shape[-1] ** -0.5)


def backward(
    backend: ModuleType, case: Case, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq``, ``dk`` and ``dv``, of the shapes of q, k and v."""
    scale = case.q.shape[-1] ** -0.5
    return backend.backward(case.dout, None, case.q, case.k, case.v, out, lse, case.layout, scale)
