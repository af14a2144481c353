"""Sizes in bytes, as numbers or as text such as "20GB"."""

from __future__ import annotations

import re
from typing import Any

from voco_model.arguments import is_whole

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgtp])(i?))?b?", re.IGNORECASE)


def parse_size(value: Any) -> int:
    """Bytes from 1000, "1000", "10GB" (10 * 1000**3) or "1.5 GiB" (1.5 * 1024**3).

    Raises:
        ValueError: anything else. Its message completes "expected max_bytes as ...".
    """
    if is_whole(value):
        return int(value)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a number of bytes such as 1000, 10GB or 10GiB")
    number, power, binary = match[1], _POWERS[(match[2] or "").lower()], bool(match[3])
    return int(float(number) * (1024 if binary else 1000) ** power)


def byte_count(name: str, value: Any, *, at_least: int) -> int:
    """The argument ``name`` in bytes, from anything that ``parse_size`` accepts.

    Raises:
        TypeError: neither an integer nor text.
        ValueError: text that isn't a size, or a size below ``at_least``.
    """
    if not isinstance(value, str) and not is_whole(value):
        raise TypeError(f"expected {name} as an int or a size such as '20GB', got {value!r}")
    try:
        size = parse_size(value)
    except ValueError as error:
        raise ValueError(f"expected {name} as {error}, got {value!r}") from None
    if size < at_least:
        raise ValueError(f"expected {name} >= {at_least}, got {value!r}")
    return size
