"""Decorators for ``torch.compile`` that don't import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def assume_constant_result(function: _F) -> _F:
    """``torch.compiler.assume_constant_result``, which imports ``torch._dynamo`` (2 s) to set this."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  (no such attribute in its type)
    return function
