"""Backends, in order of preference. Each says why it can't serve; one error lists all reasons."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from voco_kernels.attention.backends import cuda_sm90, flash_attn, reference, sdpa, triton

# One contract, a module each (none imports another):
#   missing() -> list[str]                           why it can't run on this machine at all
#   unsupported(q, k, v) -> list[str]                why it can't serve these tensors
#   forward(q, k, v, layout, scale) -> (out, lse)    lse natural log, fp32 (fp64 for fp64) [B, Hq, S]
#   backward(dout, dlse, q, k, v, out, lse, layout, scale, deterministic=True) -> (dq, dk, dv)
#       dlse may be None; deterministic: the same bits every time
BACKENDS = {
    "triton": triton,
    "cuda_sm90": cuda_sm90,
    "flash_attn": flash_attn,
    "sdpa": sdpa,
    "reference": reference,
}
# Until cuda_sm90 has run on a GPU and been measured, it serves on request only.
PREFERENCE = {"cuda": tuple(name for name in BACKENDS if name != "cuda_sm90")}
PREFERENCE_ELSEWHERE = ("sdpa", "reference")


def load(name: str) -> ModuleType:
    """The backend's module.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


def backends() -> dict[str, list[str]]:
    """Each backend's reasons why it can't run on this machine; an empty list if it can."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def choose(q: Tensor, k: Tensor, v: Tensor, name: str | None = None) -> str:
    """The named backend, or the first of the device's preferences that can serve these tensors.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't serve, or none can; the message lists every reason.
    """
    candidates = (
        (name,) if name is not None else PREFERENCE.get(q.device.type, PREFERENCE_ELSEWHERE)
    )
    reasons = {}
    for candidate in candidates:
        backend = load(candidate)
        reasons[candidate] = backend.missing() or backend.unsupported(q, k, v)
        if not reasons[candidate]:
            return candidate
    listed = "".join(f"\n  {who}: {'; '.join(why)}" for who, why in reasons.items())
    what = "a backend" if name is None else f"backend {name!r}"
    raise RuntimeError(
        f"expected {what} that can serve q {list(q.shape)}, k {list(k.shape)} {q.dtype} on "
        f"{q.device}, got none:{listed}"
    )
