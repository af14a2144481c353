"""``WorkStream``: the CUDA stream on which an engine does all its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkStream:
    """A stream of the engine's own on its model's device; no effect on a CPU.

    Each thread has its own current stream and device, so without it the work of two threads that drive
    an engine in turn would be unordered.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context whose work follows what the caller has launched, and precedes what it launches
        next."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):  # and its device
                yield
        finally:
            caller.wait_stream(self._stream)
