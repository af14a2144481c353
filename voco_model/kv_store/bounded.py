"""Calls that end in time: workers with a deadline, and a breaker that stays away after failures.

A timeout of a socket bounds one ``recv``, and a name server isn't bounded by it at all. What has to be
bounded is the whole call; so it runs in another thread, and who asked stops waiting at the deadline.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from voco_model.kv_store.base import after_fork

_IDLE_SECONDS = 10.0  # a worker without work ends after this long: nobody has to stop it


class BusyError(TimeoutError):
    """No worker came free before the deadline: the call never began."""


class Deadline:
    """A moment up to which somebody waits; it moves on as a call learns how many bytes it moves.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    def extend(self, seconds: float) -> None:
        self._seconds += seconds

    def left(self) -> float:
        """Seconds, below 0 once it is over."""
        return self._began + self._seconds - time.monotonic()

    @property
    def seconds(self) -> float:
        """From its beginning, extensions included."""
        return self._seconds


class _Task:
    __slots__ = ("call", "done", "error", "result", "state")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        self.state = "queued"  # then "running", or "abandoned" by who asked


class Workers:
    """Up to ``limit`` daemon threads that run calls with a deadline.

    A call that outlasts its deadline keeps its worker until it ends by itself, and the others serve on.
    Threads begin when they are needed, end when they are idle, and never keep an interpreter from
    exiting. After a fork the child begins with none.
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
        """What ``call()`` returns or raises, if it does so before the deadline.

        Args:
            call: runs in a worker.
            deadline: for all of it, the wait for a worker included.
            give_up: called here when the wait is over before the call is: to cut off what it waits for.

        Raises:
            TimeoutError: it didn't. What it does later is lost.
            BusyError: it didn't even begin.
        """
        task = _Task(call)
        self._submit(task)
        try:
            while not task.done.wait(max(deadline.left(), 0)):
                if deadline.left() <= 0:
                    raise self._too_late(task, deadline)
        except BaseException:  # an interrupt too: the worker is wanted back
            if give_up is not None:
                give_up()
            raise
        # Taken away from the task, of which the worker may be the last to let go: see _work.
        error, result = task.error, task.result
        task.error = task.result = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # no cycle through the traceback
        return result

    def _too_late(self, task: _Task, deadline: Deadline) -> TimeoutError:
        with self._lock:
            began = task.state != "queued"
            task.state = "abandoned"
        if began:
            return TimeoutError(f"expected an answer in {deadline.seconds:.3g} s, got none")
        return BusyError(
            f"expected one of {self._limit} workers to be free in {deadline.seconds:.3g} s, got none"
        )

    def _submit(self, task: _Task) -> None:
        with self._lock:
            self._queue.put(task)
            if self._queue.qsize() <= self._idle or self._threads == self._limit:
                return
            self._threads += 1
            self._idle += 1  # until it takes a task
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # no thread to be had: the others take the task, or it never begins
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
                        continue  # put there just now, by who counted on this thread
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
                except BaseException as error:  # whatever it is belongs to who asked
                    task.error = error
                # Nothing of the caller's may die here once the caller goes on, perhaps to the end of the
                # program: torch aborts the process if a daemon thread frees a tensor then.
                task.call = None
                task.done.set()
            del task
            with self._lock:
                self._idle += 1


class Breaker:
    """Whether to ask somebody who may be down: after a failure not before some time has passed.

    After a failure everybody stays away for ``first`` seconds; then one caller probes, and the time
    doubles, up to ``most``, with each probe that fails. The first success ends it.

    Args:
        first, most: seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self, first: float = 1.0, most: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 <= first <= most:
            raise ValueError(f"expected 0 <= first back-off <= most, got {first} and {most}")
        self._first, self._most, self._clock = first, most, clock
        self._unlock()
        after_fork(self, Breaker._unlock)
        self._wait = 0.0  # 0: nothing is known against asking
        self._until = 0.0
        self._open = False

    def _unlock(self) -> None:
        self._lock = threading.Lock()
        self._probing = False  # whoever does isn't in this process

    def allow(self) -> bool:
        """Whether to ask now. ``succeeded``, ``failed`` or ``asked_nothing`` must follow True."""
        with self._lock:
            if not self._open:
                return True
            if self._probing or self._clock() < self._until:
                return False
            self._probing = True
            return True

    def left(self) -> float:
        """Seconds until the next probe; 0 where one may be made."""
        with self._lock:
            return max(self._until - self._clock(), 0.0) if self._open else 0.0

    def succeeded(self) -> None:
        with self._lock:
            self._open = self._probing = False
            self._wait = 0.0

    def asked_nothing(self) -> None:
        """The call that was allowed never reached them; nothing is known."""
        with self._lock:
            if self._probing:
                self._probing = False
                self._until = self._clock() + self._wait

    def failed(self) -> float:
        """Stay away. Returns for how many seconds."""
        with self._lock:
            # The calls that were under way when the first one failed say nothing new.
            if not self._open or self._probing:
                self._wait = min(max(2 * self._wait, self._first), self._most)
                self._until = self._clock() + self._wait
            self._open, self._probing = True, False
            return max(self._until - self._clock(), 0.0)
