"""Times of several functions in turns, each on cold caches, so that a slow moment hits all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.harness import clock
from bench.harness.clock import Effort
from bench.harness.guard import first_line

FULL = {"cpu": Effort(0.7, 5, 100), "cuda": Effort(0.08, 5, 40)}
QUICK = {"cpu": Effort(0.01, 3, 5), "cuda": Effort(0.02, 3, 10)}

WARM_TOKENS = 8
"""Up to this many, loads are also timed warm. Larger entries leave no cache as it was."""


@dataclass
class Job:
    """A function to be timed, such as a load that is ready to run.

    Attributes:
        run: one load. What it returns is freed after the clock has stopped.
        check: what is wrong with the result of a ``run`` into poisoned memory; "" if nothing.
        before: run ahead of each ``run``, not timed.
        prime: run once, after the memory is poisoned and before the run that is checked.
        queued: whether ``run`` only enqueues work on a CUDA stream, so that the device's time can
            be measured apart from the host's.
        times: in milliseconds, by kind: "wall", "warm", "device".
    """

    run: Callable[[], object]
    check: Callable[[object], str]
    before: Callable[[], object] = lambda: None
    prime: Callable[[], object] = lambda: None
    queued: bool = False
    times: dict[str, list[float]] = field(default_factory=dict)


class Eviction:
    """Evicts the CPU's caches, by reading a buffer of at least twice the last-level cache.

    It is read twice: caches that detect streaming reads don't keep what is read once.
    """

    def __init__(self) -> None:
        self.nbytes = max(2 * last_level_cache(), 64 << 20)
        # Ones: pages that were never written are all the same page of zeros.
        self._buffer = np.ones(self.nbytes // 8, dtype=np.int64)

    def __call__(self) -> None:
        self._buffer.max()
        self._buffer.max()


def last_level_cache() -> int:
    """Bytes of the first core's largest cache; 0 where the system doesn't say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1] in units), default=0)


class Clock:
    """Times jobs of one device in turns.

    Attributes:
        evicted_bytes: what is read before each call, on the CPU, and written, on the GPU, which evicts
            the caches.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._device, self._effort = device, effort
        self._evict = Eviction()
        self.evicted_bytes = {"cpu": self._evict.nbytes}
        self._flush = None
        if device.type == "cuda":
            self._flush = clock.Flush(device)
            self.evicted_bytes["cuda"] = self._flush.buffer.nbytes

    def time(self, jobs: Sequence[Job], *, warm: bool) -> list[str]:
        """Fill the jobs' ``times``: "wall", "warm" if asked for, "device" of those that are queued.

        Returns:
            For each job why it failed; "" if it didn't.
        """
        failures = ["" for _ in jobs]
        with _no_collections():
            self._in_turns(jobs, failures, self._wall)
            queued = [index for index, job in enumerate(jobs) if job.queued]
            if queued:
                reasons = [failures[index] for index in queued]
                self._in_turns([jobs[index] for index in queued], reasons, self._on_device)
                for index, reason in zip(queued, reasons, strict=True):
                    failures[index] = reason
            for index, job in enumerate(jobs if warm else ()):
                if not failures[index]:
                    failures[index] = _reason_of(self._warm, job)
        return failures

    def _in_turns(
        self, jobs: Sequence[Job], failures: list[str], time_one: Callable[[Job], None]
    ) -> None:
        effort = self._effort
        finish = time.monotonic() + effort.seconds * len(jobs)
        order, shuffle = list(range(len(jobs))), random.Random(0).shuffle
        for turn in range(effort.most):
            if turn >= effort.least and time.monotonic() > finish:
                break
            shuffle(order)  # so that no job always follows the same one
            for index in order:
                if not failures[index]:
                    failures[index] = _reason_of(time_one, jobs[index])

    def _wall(self, job: Job) -> None:
        """From the call until the device is done."""
        job.before()
        if self._flush is not None:
            self._flush()
        self._evict()
        self._synchronize()
        started = time.perf_counter()
        kept = job.run()
        self._synchronize()
        _note(job, "wall", time.perf_counter() - started)
        del kept

    def _warm(self, job: Job) -> None:
        """Calls in a row, whose data and code stay in the caches."""
        finish = time.monotonic() + self._effort.seconds / 4
        for _ in range(10 * self._effort.most):
            job.before()
            self._synchronize()
            started = time.perf_counter()
            kept = job.run()
            self._synchronize()
            _note(job, "warm", time.perf_counter() - started)
            del kept
            if time.monotonic() > finish:
                return

    def _on_device(self, job: Job) -> None:
        """Between two events, enqueued while the device is still busy with evicting its cache."""
        job.before()
        host_ms = float(np.median(job.times["wall"]))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._flush.repeats_covering(host_ms)):
            self._flush()
        start.record()
        kept = job.run()
        end.record()
        torch.cuda.synchronize()
        _note(job, "device", 1e-3 * start.elapsed_time(end))
        del kept

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _note(job: Job, what: str, seconds: float) -> None:
    job.times.setdefault(what, []).append(1e3 * seconds)


def _reason_of(time_one: Callable[[Job], None], job: Job) -> str:
    try:
        time_one(job)
    except Exception as error:  # whatever a load raises becomes its row's reason
        return first_line(error)
    return ""


@contextmanager
def _no_collections() -> Iterator[None]:
    """The garbage collector stays out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
