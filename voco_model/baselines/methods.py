"""The methods by name, and ``apply``."""

from __future__ import annotations

from voco_model.baselines.base import Method
from voco_model.baselines.fastv import FastV
from voco_model.baselines.full import Full
from voco_model.baselines.pooling import Pooling
from voco_model.baselines.qformer import QFormer
from voco_model.baselines.random_tokens import RandomTokens
from voco_model.baselines.voco import Untrained, VoCo

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Full, VoCo, Untrained, FastV, RandomTokens, Pooling, QFormer)
}


def apply(name: str, model, processor, num_tokens: int | None = None, **options) -> Method:
    """Apply a method to a LLaVA, until ``undo``.

    Args:
        name: a key of ``METHODS``.
        model: LLaVA-1.5 or LLaVA-NeXT, not enabled; ``"random"``, ``"pooling"`` and ``"qformer"``
            support only LLaVA-1.5.
        processor: its processor.
        num_tokens: tokens per image.
        options: options of the method's class, such as ``layer`` of ``"fastv"``.

    Raises:
        TypeError: another model class, or an unknown option.
        ValueError: an unknown name, a model in use, or an argument out of range. Nothing is changed
            then.
    """
    return method_class(name)(model, processor, num_tokens, **options)


def method_class(name: str) -> type[Method]:
    """Raise ``ValueError`` for a name that ``METHODS`` doesn't have."""
    if name not in METHODS:
        raise ValueError(f"expected a method among {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
