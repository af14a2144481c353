"""Checks of arguments that many functions share."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether this is an int, or stands for one as NumPy's integers do; a bool doesn't."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """The value as an int: an int, or what stands for one, such as NumPy's integers.

    Raises:
        ValueError: anything else, a bool among them, or a smaller one.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise ValueError(f"expected an int {name} >= {at_least}, got {value!r}")
    return number
