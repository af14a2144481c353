"""Which arguments count as integers: Python's and NumPy's, but no bool."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import torch


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def to_int(value: Any, name: str) -> int:
    """An int, a NumPy integer or a tensor of one integer, as an int.

    Raises:
        TypeError: anything else: a bool, a float, None.
    """
    logical = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool
    if not logical and hasattr(value, "__index__"):
        try:
            return index(value)
        except (
            TypeError
        ):  # an array or a tensor of something else, which has the method all the same
            pass
    raise TypeError(f"expected {name} as an int, got {type(value).__name__} {value!r}")
