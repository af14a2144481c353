"""The clock by which a folder of entries knows which of them was used last."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from voco_model.kv_store.base import after_fork


class UseClock:
    """Nanoseconds that only rise, whatever the system's clock does, for all processes of a folder.

    It is the system's clock where that is ahead of every use there was. Where it isn't, because it was
    put back or another process's is ahead, this one continues from the latest use at the usual speed.
    Processes share the modification time of a file. Uses by one process are in order, and so are those
    by processes whose clocks differ, unless they coincide.

    Args:
        path: of that file, which is made again if it is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ahead = 0  # of the system's clock
        self._last = 0
        self._unlock()
        after_fork(self, UseClock._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def now(self) -> int:
        """The present, later than every time that this or another process was given before."""
        told = self._told()
        with self._lock:
            system = time.time_ns()
            if system > self._last and system > told:
                self._ahead, now = 0, system
            else:
                now = max(system + self._ahead, told + 1, self._last + 1)
                self._ahead = now - system
            self._last = now
        self._tell(now)
        return now

    def observe(self, used: int) -> None:
        """Notes the time of a use, which ``now`` is to be later than."""
        with self._lock:
            if used > self._last:
                self._ahead = max(self._ahead, used - time.time_ns())
                self._last = used

    def _told(self) -> int:
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError:
            return 0

    def _tell(self, now: int) -> None:
        # Where this fails (a read-only disk, another user's file), uses can't be marked either.
        try:
            try:
                os.utime(self._path, ns=(now, now))
            except FileNotFoundError:
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                os.utime(self._path, ns=(now, now))
        except OSError:
            pass
