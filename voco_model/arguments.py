"""Checks of integer arguments."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether this is an integer: an int or one of NumPy's, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """The value as an int. NumPy's integers and others with ``__index__`` are accepted.

    Raises:
        ValueError: not an integer (a bool isn't one here), or less than ``at_least``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise ValueError(f"expected an int {name} >= {at_least}, got {value!r}")
    return number
