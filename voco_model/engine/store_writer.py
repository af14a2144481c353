"""``StoreWriter``: writes entries to a store in a background thread."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from voco_model.engine.image_job import ImageJob
from voco_model.kv_store.base import Store, after_fork

logger = logging.getLogger("voco_model.engine")

# At most so many entries wait to be written; further ones are dropped. From half as many on, each new
# image waits for the store, up to _PATIENCE seconds.
_MAX_UNWRITTEN = 64
_PATIENCE = 5.0
# A store that has finished no entry for this many seconds counts as hanging.
_STALLED = 60.0

_writers: weakref.WeakSet[StoreWriter] = weakref.WeakSet()


class StoreWriter:
    """A queue of entries to be written to a store.

    The thread is a daemon that ends when the queue is empty. So a hanging store doesn't keep the process
    from exiting (with ``ThreadPoolExecutor`` it would), and after a fork or an interrupted start the
    next entry simply starts a new thread.

    Attributes:
        failures: number of entries that were not stored.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Reentrant: a signal handler may close the engine while its thread is in here.
        self._lock = threading.RLock()
        self._queue: deque[tuple[Future, ImageJob]] = deque()
        self._writing: set[Future] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.failures = 0
        _writers.add(self)
        after_fork(self, StoreWriter._renew)

    def write(self, job: ImageJob) -> None:
        """Queues a job's entry. The job is kept alive until its entry is stored, so that other requests
        for the image find it."""
        with self._lock:
            if self._closed:
                self._not_stored(job, "the engine is closed")
            elif len(self._pending()) >= _MAX_UNWRITTEN:
                self._not_stored(job, "the store is too slow")
            else:
                self._queue.append((Future(), job))
                self._start()

    def catch_up(self) -> None:
        """Waits briefly if many entries are unwritten."""
        pending = self._pending()
        if len(pending) >= _MAX_UNWRITTEN // 2:
            wait(pending[:1], _PATIENCE)

    def flush(self, timeout: float | None = None, *, stalled: float = _STALLED) -> bool:
        """Waits until every entry is written or has failed. Returns whether that was in time.

        Args:
            timeout: seconds. None waits as long as the store finishes an entry every ``stalled``
                seconds.
        """
        with self._lock:
            self._start()
            pending = self._pending()
        if timeout is not None:
            return not wait(pending, timeout).not_done
        while pending:
            done, waiting = wait(pending, stalled, FIRST_COMPLETED)
            if not done:
                logger.warning(
                    "stopped waiting for %d entries: the store has written none for %g s",
                    len(waiting),
                    stalled,
                )
                return False
            pending = list(waiting)
        return True

    def close(self, timeout: float | None = None) -> bool:
        """Flushes, drops what is still queued, and accepts no more. Returns whether all was written."""
        self._closed = True
        done = self.flush(timeout)
        with self._lock:
            dropped = len(self._queue)
            self._queue.clear()
            self.failures += dropped
        if dropped:
            logger.warning("%d entries could not be stored: the store hangs", dropped)
        return done

    def _pending(self) -> list[Future]:
        with self._lock:
            return [*self._writing, *(future for future, _ in self._queue)]

    def _start(self) -> None:
        if not self._queue or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, name="voco-store-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # out of threads, or the interpreter is shutting down
            while self._queue:
                future, job = self._queue.popleft()
                self._not_stored(job, error)
                future.set_result(None)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                future, job = self._queue.popleft()
                self._writing.add(future)
            try:
                self._store.put(job.entry)
            except BaseException as error:  # there is no caller to raise it to
                self._not_stored(job, error)
            with self._lock:
                self._writing.discard(future)
            future.set_result(None)

    def _not_stored(self, job: ImageJob, why: Any) -> None:
        self.failures += 1
        logger.warning("the entry of image %s could not be stored: %s", job.key, why)

    def _renew(self) -> None:
        # The parent writes what was queued before the fork.
        self._lock = threading.RLock()
        self._queue, self._writing, self._thread = deque(), set(), None


@atexit.register
def _flush_all() -> None:
    for writer in list(_writers):
        writer.flush(stalled=_PATIENCE)
