"""The table of attention backends and the choice among them.

Each backend reports why it can't serve a call; if none can, one error lists every reason.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from voco_kernels.attention.backends import cuda_sm90, flash_attn, reference, sdpa, triton

# Each backend is a module with these functions (no backend imports another):
#   missing() -> list[str]                           why it can't run on this machine at all
#   unsupported(q, k, v) -> list[str]                why it can't serve these tensors
#   forward(q, k, v, layout, scale) -> (out, lse)    lse: natural log, [B, Hq, S], fp32 (fp64 for fp64)
#   backward(dout, dlse, q, k, v, out, lse, layout, scale, deterministic=True) -> (dq, dk, dv)
#       dlse may be None; deterministic: the same bits on every call
BACKENDS = {
    "triton": triton,
    "cuda_sm90": cuda_sm90,
    "flash_attn": flash_attn,
    "sdpa": sdpa,
    "reference": reference,
}
# cuda_sm90 is never chosen by default until it has been run and measured on a GPU.
PREFERENCE = {"cuda": tuple(name for name in BACKENDS if name != "cuda_sm90")}
PREFERENCE_ELSEWHERE = ("sdpa", "reference")


def load(name: str) -> ModuleType:
    """Return a backend's module.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


def backends() -> dict[str, list[str]]:
    """Map each backend to the reasons why it can't run on this machine; empty if it can."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def choose(q: Tensor, k: Tensor, v: Tensor, name: str | None = None) -> str:
    """Name the backend to use: ``name`` if given, or the device's first preference that can serve.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend can't serve these tensors, or none can; the message lists
            every reason.
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
    what = "no backend can" if name is None else f"backend {name!r} can't"
    raise RuntimeError(
        f"{what} serve q {list(q.shape)}, k {list(k.shape)} {q.dtype} on {q.device}:{listed}"
    )
