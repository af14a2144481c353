"""Times of one function, on CUDA and on the CPU, and the memory that it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from bench.harness.guard import first_line

Function = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure one function: until ``seconds`` are spent, within the bounds on
    repeats."""

    seconds: float
    least: int
    most: int


FULL = {"cuda": Effort(0.15, 5, 300), "cpu": Effort(0.6, 3, 50)}
QUICK = {"cuda": Effort(0.04, 5, 50), "cpu": Effort(0.02, 3, 10)}


@dataclass(frozen=True)
class Timing:
    """One measurement, in milliseconds.

    Attributes:
        p20, p50, p80: quantiles over the repeats. On CUDA device time, with a cold L2 and with the
            launches enqueued before the clock starts, so that a slow host does not count.
        repeats: how many calls the quantiles are of.
        host_ms: on CUDA, the host's median time to enqueue one call. Where it exceeds p50, eager
            calls in a row run at the host's speed.
        graph_p50: on CUDA, the median of replays of a captured graph, where it was asked for.
        graph_reason: why there is no graph_p50, if it was asked for.
    """

    p20: float
    p50: float
    p80: float
    repeats: int
    host_ms: float | None = None
    graph_p50: float | None = None
    graph_reason: str | None = None

    def to_json(self) -> dict:
        return asdict(self)


def measure(
    function: Function, device: torch.device, effort: Effort, graph: bool = False
) -> Timing:
    """Time ``function``, which must have run once already, so that compilation is not measured."""
    if device.type == "cpu":
        return _measure_cpu(function, effort)
    flush = Flush(device)
    times, host_ms = _measure_cuda(function, effort, flush)
    if not graph:
        return Timing(*quantiles(times), len(times), host_ms)
    try:
        captured = capture(function)
    except RuntimeError as error:
        reason = first_line(error)
        return Timing(*quantiles(times), len(times), host_ms, graph_reason=reason)
    replays, _ = _measure_cuda(captured.replay, effort, flush)
    return Timing(*quantiles(times), len(times), host_ms, statistics.median(replays))


class Flush:
    """Writes a buffer of at least twice the L2, which evicts what the last call left there."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(2 * l2_bytes, 128 << 20), dtype=torch.int8, device=device)
        self()
        start, end = _events()
        start.record()
        for _ in range(4):
            self()
        end.record()
        torch.cuda.synchronize()
        self.milliseconds = max(start.elapsed_time(end) / 4, 1e-3)

    def __call__(self) -> None:
        self.buffer.zero_()

    def repeats_covering(self, host_ms: float) -> int:
        """Flushes to enqueue so that the device is busy while the host enqueues a call."""
        return min(max(1, math.ceil(1.5 * host_ms / self.milliseconds)), 200)


def _measure_cuda(function: Function, effort: Effort, flush: Flush) -> tuple[list[float], float]:
    host, device = [], []
    for _ in range(3):
        start, end = _events()
        torch.cuda.synchronize()
        started = time.perf_counter()
        start.record()
        function()
        end.record()
        host.append(1e3 * (time.perf_counter() - started))
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
        if device[-1] > 1e3 * effort.seconds:
            break
    host_ms = statistics.median(host)
    flushes = flush.repeats_covering(host_ms)
    one_call = min(device) + flushes * flush.milliseconds
    repeats = min(max(effort.least, int(1e3 * effort.seconds / one_call)), effort.most)
    pairs = [_events() for _ in range(repeats)]
    for start, end in pairs:
        for _ in range(flushes):
            flush()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs], host_ms


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def capture(function: Function) -> torch.cuda.CUDAGraph:
    """``function`` as a CUDA graph, run and replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    captured.replay()
    return captured


def _measure_cpu(function: Function, effort: Effort) -> Timing:
    times = []
    finish = time.perf_counter() + effort.seconds
    while len(times) < effort.least or (time.perf_counter() < finish and len(times) < effort.most):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return Timing(*quantiles(times), len(times))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated between neighbours."""
    ordered = sorted(times)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)


def summary(milliseconds: list[float]) -> dict:
    """p20, p50 and p80, and of how many calls."""
    p20, p50, p80 = quantiles(milliseconds)
    return {"p20": p20, "p50": p50, "p80": p80, "repeats": len(milliseconds)}


def peak_extra_bytes(function: Function, device: torch.device) -> int | None:
    """Device memory that one call takes at its peak beyond what stood there; None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def tflops(flops: int, milliseconds: float) -> float:
    """Rate in TFLOP/s of ``flops`` operations in ``milliseconds``."""
    return flops / (milliseconds * 1e-3) / 1e12
