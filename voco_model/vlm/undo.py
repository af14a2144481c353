"""Changes to an object that an ``ExitStack`` takes back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


def remember(steps: ExitStack, owner: Any, name: str) -> None:
    """Have ``steps`` restore this attribute, or its absence."""
    if hasattr(owner, name):
        steps.callback(setattr, owner, name, getattr(owner, name))
    else:
        steps.callback(delattr, owner, name)


def put(steps: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``steps`` are closed."""
    remember(steps, owner, name)
    setattr(owner, name, value)
