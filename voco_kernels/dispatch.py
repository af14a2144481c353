"""Backends, in order of preference. Each says why it can't serve; one error lists all reasons."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

# One contract, a module each (none imports another):
#   missing() -> list[str]                           why it can't run on this machine at all
#   unsupported(q, k, v) -> list[str]                why it can't serve these tensors
#   forward(q, k, v, layout, scale) -> (out, lse)    lse natural log, fp32 (fp64 for fp64) [B, Hq, S]
#   backward(dout, dlse, q, k, v, out, lse, layout, scale) -> (dq, dk, dv)    dlse may be None
BACKENDS = ("triton", "flash_attn", "sdpa", "reference")
PREFERENCE = {"cuda": BACKENDS, "cpu": ("sdpa", "reference")}


def load(name: str) -> ModuleType:
    """The backend's module, imported on first use.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    return import_module(f"voco_kernels.backends.{name}")


def backends() -> dict[str, list[str]]:
    """Each backend's reasons why it can't run on this machine; an empty list if it can."""
    return {name: load(name).missing() for name in BACKENDS}


def choose(q: Tensor, k: Tensor, v: Tensor, name: str | None = None) -> str:
    """The named backend, or the first of the device's preferences that can serve these tensors.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't serve, or none can; the message lists every reason.
    """
    candidates = (name,) if name else PREFERENCE.get(q.device.type, ("sdpa", "reference"))
    reasons = {}
    for candidate in candidates:
        backend = load(candidate)
        reasons[candidate] = backend.missing() or backend.unsupported(q, k, v)
        if not reasons[candidate]:
            return candidate
    listed = "".join(f"\n  {who}: {'; '.join(why)}" for who, why in reasons.items())
    what = f"backend {name!r}" if name else "a backend"
    raise RuntimeError(
        f"expected {what} that can serve q {list(q.shape)}, k {list(k.shape)} {q.dtype} on "
        f"{q.device}, got none:{listed}"
    )


def strided_reasons(*tensors: Tensor) -> list[str]:
    """The reason that several backends share: they need a contiguous last dimension."""
    if all(tensor.stride(-1) == 1 for tensor in tensors):
        return []
    strides = ", ".join(str(tuple(tensor.stride())) for tensor in tensors)
    return [f"expected q, k and v with a contiguous last dimension, got strides {strides}"]


def dtype_reasons(tensor: Tensor, *supported: torch.dtype) -> list[str]:
    """The reason that several backends share: the dtype is none of theirs."""
    if tensor.dtype in supported:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
    return [f"expected {names}, got {str(tensor.dtype).removeprefix('torch.')}"]
