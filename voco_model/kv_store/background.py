"""``Background``: jobs for a daemon thread, finished within limits when the interpreter exits."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from voco_model.kv_store.base import StoreUnavailable, after_fork, logger

RUNNING_SECONDS = 30.0  # to wait for a running write of a key
_EXIT_SECONDS = 5.0  # for all that is in the background when the interpreter exits


class Background:
    """Jobs by key, done in order by a daemon thread that exists while there are any.

    Args:
        do: called with up to ``batch`` jobs at a time, as pairs of key and job.
        limit: on the total cost of the waiting jobs; a single one may cost more.
        name: of the thread.

    Attributes:
        left_to_parent: in a forked child, the keys of the jobs that were not done when it was forked.
    """

    def __init__(
        self,
        do: Callable[[list[tuple[str, Any]]], None],
        limit: int,
        name: str,
        batch: int = 1,
    ) -> None:
        self._do, self._limit, self._name, self._batch = do, limit, name, batch
        self.left_to_parent: list[str] = []
        self._begin()
        after_fork(self, Background._begin_in_child)
        _backgrounds.add(self)

    def _begin_in_child(self) -> None:
        """The parent does what was waiting."""
        self.left_to_parent = [*self._waiting, *self._running]
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._cost = 0
        self._running: list[str] = []
        self._alive = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting) + len(self._running)

    def __contains__(self, key: str) -> bool:
        """Whether a job of this key is waiting or running."""
        with self._changed:
            return key in self._waiting or key in self._running

    def add(self, key: str, job: Any, cost: int, *, replace: bool = True) -> bool:
        """Adds a job, replacing a waiting one of the same key. Returns False if there is no room for it.

        Args:
            replace: if False, the job is dropped if one of that key is waiting or running.
        """
        with self._changed:
            if not replace and (key in self._waiting or key in self._running):
                return True
            self._forget(key)
            if self._waiting and self._cost + cost > self._limit:
                return False
            self._waiting[key] = job, cost
            self._cost += cost
            if not self._alive:
                try:
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                except RuntimeError:  # no more threads, or the interpreter is about to exit
                    self._forget(key)
                    return False
                self._alive = True
            return True

    def cancel(self, key: str) -> None:
        """Removes the waiting job of a key, and waits for a running one to end.

        Raises:
            StoreUnavailable: it doesn't end in time.
        """
        with self._changed:
            self._forget(key)
            if not self._changed.wait_for(lambda: key not in self._running, RUNNING_SECONDS):
                raise StoreUnavailable(
                    f"a background write of {key} has not ended in {RUNNING_SECONDS} s"
                )

    def wait(self, end: float | None) -> bool:
        """Waits until all jobs are done, or until ``end`` in monotonic seconds. Returns whether they
        are."""
        timeout = None if end is None else max(end - time.monotonic(), 0)
        with self._changed:
            return self._changed.wait_for(lambda: not self._alive, timeout)

    def drop(self, why: str) -> int:
        """Drops all waiting jobs, logs why, and returns their number."""
        with self._changed:
            keys = list(self._waiting)
            self._waiting.clear()
            self._cost = 0
        if keys:
            logger.warning("%s: %d jobs left undone because %s", self._name, len(keys), why)
        return len(keys)

    def _forget(self, key: str) -> None:
        self._cost -= self._waiting.pop(key, (None, 0))[1]

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._do(jobs)
            except Exception:
                logger.exception("%s: jobs %s failed", self._name, self._running)
            # Release the jobs' tensors before _next reports that all is done. The program may end then,
            # and torch aborts the process if a daemon thread frees a tensor during interpreter shutdown.
            del jobs

    def _next(self) -> list[tuple[str, Any]]:
        jobs = []
        with self._changed:
            while self._waiting and len(jobs) < self._batch:
                key, (job, cost) = self._waiting.popitem(last=False)
                self._cost -= cost
                jobs.append((key, job))
            self._running = [key for key, _ in jobs]
            self._alive = bool(jobs)
            self._changed.notify_all()
        return jobs


_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()


def _at_exit() -> None:
    end = time.monotonic() + _EXIT_SECONDS
    backgrounds = list(_backgrounds)
    for background in backgrounds:
        if not background.wait(end - _EXIT_SECONDS / 5):
            background.drop(f"the interpreter exits, and waits only {_EXIT_SECONDS:.3g} s for them")
    for background in backgrounds:  # running jobs may end, unless they are stuck
        background.wait(end)


# If Python allows it, before it joins its threads and refuses to start new ones.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
