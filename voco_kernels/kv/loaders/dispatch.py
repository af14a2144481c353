"""The choice of a loader for a move."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from voco_kernels.kv.move import Move

# In order of preference. Each refuses caches on other devices than its own.
LOADERS = ("cpu", "cuda", "triton")


def choose(move: Move, loader: str | None) -> ModuleType:
    """The loader of that name, or the first one that can make the move.

    Raises:
        ValueError: no loader has that name.
        NotImplementedError: that loader, or every loader, can't make the move; with the reasons.
    """
    if loader is not None and loader not in LOADERS:
        raise ValueError(f"expected a loader of {', '.join(LOADERS)}, got {loader!r}")
    why_not = {}
    for name in LOADERS if loader is None else (loader,):
        module = import_module(f"{__package__}.{name}")
        why_not[name] = module.missing() or module.unsupported(move)
        if not why_not[name]:
            return module
    reasons = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in why_not.items())
    raise NotImplementedError(f"no loader can make this move:\n{reasons}")
