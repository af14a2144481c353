"""Warnings about models that run, but not as they were trained. Each is given once per model."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

_given: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


class VoCoWarning(UserWarning):
    """A model is used otherwise than it was trained; its answers are probably poor."""


def warn_once(model: Any, message: str, *, stacklevel: int = 3) -> None:
    """Give a ``VoCoWarning``, unless this model's users have seen it.

    Args:
        stacklevel: as for ``warnings.warn``; 3 is the caller of the function that calls this one.
    """
    given = _given.setdefault(model, set())
    if message not in given:
        given.add(message)
        warnings.warn(message, VoCoWarning, stacklevel=stacklevel)


def training_gap(config, num_voco: int | None) -> str | None:
    """A warning if a model wasn't trained to answer through ``num_voco`` VoCo tokens, else None.

    Args:
        config: the model's, before ``enable`` changes it. It records the number of VoCo tokens of the
            training.
        num_voco: VoCo tokens per image; None for the config's number.
    """
    trained = getattr(config, "num_voco", None)
    if trained is None:
        return (
            "this model was never trained with VoCo tokens (its config has no num_voco), so its answers "
            "about compressed images will be poor; train it first (docs/training.md), or load a "
            "checkpoint that was"
        )
    if (getattr(config, "voco_baseline", None) or {}).get("name") == "full":
        return (
            "this model was trained with VoCo tokens but without their mask (an upper bound), so its "
            "answers about compressed images will be poor; load a checkpoint that was trained with the "
            "mask"
        )
    if num_voco is not None and num_voco != trained:
        return (
            f"this model was trained with num_voco={trained} and is used with {num_voco}, so its "
            "answers about compressed images may be poor; leave num_voco out, "
            "unless training drew several "
            "numbers"
        )
    return None
