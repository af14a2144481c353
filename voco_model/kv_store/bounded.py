"""Calls with a deadline, and a circuit breaker that stays away from a server after failures.

A socket's timeout limits a single ``recv``, and doesn't apply to the name lookup at all. To limit a
whole call, it runs in another thread, and the caller stops waiting at the deadline.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from voco_model.kv_store.base import after_fork

_IDLE_SECONDS = 10.0  # after which a worker without work ends, so that it needn't be stopped


class BusyError(TimeoutError):
    """No worker was free before the deadline: the call was never made."""


class Deadline:
    """The time by which a call must end; extended as the call learns how many bytes it transfers.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    def extend(self, seconds: float) -> None:
        self._seconds += seconds

    def left(self) -> float:
        """Seconds until the deadline; negative once it has passed."""
        return self._began + self._seconds - time.monotonic()

    @property
    def seconds(self) -> float:
        """From the start, including extensions."""
        return self._seconds


class _Task:
    __slots__ = ("call", "done", "error", "result", "state")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        self.state = "queued"  # then "running", or "abandoned" by the caller


class Workers:
    """Up to ``limit`` daemon threads that run calls with a deadline.

    A call that outlasts its deadline occupies its worker until it ends by itself. Threads start when
    they are needed, end when they are idle, and never keep the interpreter from exiting. A forked child
    starts without any.
    """

    def __init__(self, limit: int, name: str) -> None:
        if limit < 1:
            raise ValueError(f"expected at least one worker, got {limit}")
        self._limit = limit
        self._name = name
        self._begin()
        after_fork(self, Workers._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0

    def run(
        self, call: Callable[[], Any], deadline: Deadline, give_up: Callable[[], None] | None = None
    ) -> Any:
        """The result of ``call()``, or its exception, if it ends before the deadline.

        Args:
            call: run by a worker.
            deadline: includes the wait for a worker.
            give_up: called in this thread if the wait ends before the call, to cut it off.

        Raises:
            TimeoutError: the call didn't end in time. Its later result is discarded.
            BusyError: the call didn't even begin.
        """
        task = _Task(call)
        self._submit(task)
        try:
            while not task.done.wait(max(deadline.left(), 0)):
                if deadline.left() <= 0:
                    raise self._too_late(task, deadline)
        except BaseException:  # also an interrupt: the worker is needed for other calls
            if give_up is not None:
                give_up()
            raise
        # Moved out of the task, because the worker may be the last to release it: see _work.
        error, result = task.error, task.result
        task.error = task.result = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # avoids a reference cycle through the traceback
        return result

    def _too_late(self, task: _Task, deadline: Deadline) -> TimeoutError:
        with self._lock:
            began = task.state != "queued"
            task.state = "abandoned"
        if began:
            return TimeoutError(f"no answer within {deadline.seconds:.3g} s")
        return BusyError(f"none of {self._limit} workers was free within {deadline.seconds:.3g} s")

    def _submit(self, task: _Task) -> None:
        with self._lock:
            self._queue.put(task)
            if self._queue.qsize() <= self._idle or self._threads == self._limit:
                return
            self._threads += 1
            self._idle += 1  # until it takes a task
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # out of threads: another worker takes the task, or it never begins
            with self._lock:
                self._threads -= 1
                self._idle -= 1

    def _work(self) -> None:
        while True:
            try:
                task = self._queue.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if not self._queue.empty():
                        continue  # just submitted by a caller that counted on this thread
                    self._threads -= 1
                    self._idle -= 1
                    return
            with self._lock:
                self._idle -= 1
                wanted = task.state == "queued"
                if wanted:
                    task.state = "running"
            if wanted:
                try:
                    task.result = task.call()
                except BaseException as error:  # for the caller, whatever it is
                    task.error = error
                # Release the caller's objects before it continues, perhaps to the end of the program:
                # torch aborts the process if a daemon thread frees a tensor during interpreter shutdown.
                task.call = None
                task.done.set()
            del task
            with self._lock:
                self._idle += 1


class Breaker:
    """Decides whether to call a server that may be down.

    After a failure, no calls are allowed for ``first`` seconds; then a single one probes, and the pause
    doubles with each probe that fails, up to ``most``. The first success ends it.

    Args:
        first, most: seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self, first: float = 1.0, most: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 <= first <= most:
            raise ValueError(f"expected back_off with 0 <= first <= most, got {first} and {most}")
        self._first, self._most, self._clock = first, most, clock
        self._unlock()
        after_fork(self, Breaker._unlock)
        self._wait = 0.0  # 0 unless the last call failed
        self._until = 0.0
        self._open = False

    def _unlock(self) -> None:
        self._lock = threading.Lock()
        self._probing = False  # the prober isn't in a forked child

    def allow(self) -> bool:
        """Whether to call now. If so, call ``succeeded``, ``failed`` or ``asked_nothing`` afterwards."""
        with self._lock:
            if not self._open:
                return True
            if self._probing or self._clock() < self._until:
                return False
            self._probing = True
            return True

    def left(self) -> float:
        """Seconds until the next probe; 0 if one is allowed now."""
        with self._lock:
            return max(self._until - self._clock(), 0.0) if self._open else 0.0

    def succeeded(self) -> None:
        with self._lock:
            self._open = self._probing = False
            self._wait = 0.0

    def asked_nothing(self) -> None:
        """The allowed call never reached the server, so nothing is known about it."""
        with self._lock:
            if self._probing:
                self._probing = False
                self._until = self._clock() + self._wait

    def failed(self) -> float:
        """The server failed. Returns the seconds to stay away."""
        with self._lock:
            # Calls that were running when the first one failed add nothing.
            if not self._open or self._probing:
                self._wait = min(max(2 * self._wait, self._first), self._most)
                self._until = self._clock() + self._wait
            self._open, self._probing = True, False
            return max(self._until - self._clock(), 0.0)
