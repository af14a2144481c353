"""Integer arguments: Python's and NumPy's integers, but no bools."""

from __future__ import annotations

from operator import index
from typing import Any, TypeGuard

import numpy as np
import torch


def is_integer(value: Any) -> TypeGuard[int | np.integer]:
    """Whether ``value`` is an int or a NumPy integer, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def to_int(value: Any, name: str) -> int:
    """``value`` as an int: an int, a NumPy integer or a tensor of one integer.

    Args:
        name: of the argument, with its article, for the error.

    Raises:
        TypeError: anything else, such as a bool, a float or None.
    """
    logical = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool
    if not logical and hasattr(value, "__index__"):
        try:
            return index(value)
        except TypeError:
            pass  # arrays and tensors have the method whatever they contain; the error is below
    raise TypeError(f"expected {name} as an int, got {type(value).__name__} {value!r}")
