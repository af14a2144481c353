"""``StageClock``: times the stages of an engine, by the host's clock or by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageClock:
    """Records how long named stages take.

    Args:
        device: on CUDA, stages are timed by events on the current stream, without a sync before
            ``read``.
        enabled: if False, nothing is timed.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, list[float]] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if not self.enabled:
            yield
        elif self._on_gpu:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._pending.append((stage, start, stop))
        else:
            start = time.perf_counter()
            yield
            self._seconds.setdefault(stage, []).append(time.perf_counter() - start)

    def read(self) -> dict[str, list[float]]:
        """The seconds of each run of each stage since the last call."""
        for stage, start, stop in self._pending:
            stop.synchronize()
            self._seconds.setdefault(stage, []).append(start.elapsed_time(stop) / 1e3)
        seconds, self._seconds, self._pending = self._seconds, {}, []
        return seconds
