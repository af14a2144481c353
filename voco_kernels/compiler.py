"""Decorators for ``torch.compile`` that don't import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which imports ``torch._dynamo`` (2 s) to set this."""
    function._dynamo_marked_constant = True
    return function
