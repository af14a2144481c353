"""``WorkStream``: everything that an engine does on a GPU, in one order, whoever drives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkStream:
    """A stream of the engine's own on its model's device; nothing on a CPU.

    Threads have current streams and devices of their own: two that drive an engine in turn would
    otherwise touch its cache in no order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work inside comes after what the caller has launched, and before what he launches next."""
        if self._stream is None:
            yield
            return
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):  # and its device
                yield
        finally:
            callers.wait_stream(self._stream)
