"""``UseClock``: the times of uses, by which the least recently used entries are found."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from voco_model.kv_store.base import after_fork


class UseClock:
    """A clock in nanoseconds that never goes back, shared by all processes that use a folder.

    It follows the system's clock while that is ahead of every use so far. Otherwise, because the
    system's clock was set back or another process's is ahead, it continues from the latest use at normal
    speed. Processes share the modification time of a file. Uses by one process are in order, and so are
    uses by processes whose clocks differ, unless they are simultaneous.

    Args:
        path: of the shared file, which is created again if it is removed.
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
        """The current time, later than any that this or another process has been given."""
        shared = self._read()
        with self._lock:
            system = time.time_ns()
            if system > self._last and system > shared:
                self._ahead, now = 0, system
            else:
                now = max(system + self._ahead, shared + 1, self._last + 1)
                self._ahead = now - system
            self._last = now
        self._write(now)
        return now

    def observe(self, used: int) -> None:
        """Makes ``now`` later than the time of a use."""
        with self._lock:
            if used > self._last:
                self._ahead = max(self._ahead, used - time.time_ns())
                self._last = used

    def _read(self) -> int:
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError:
            return 0

    def _write(self, now: int) -> None:
        # If this fails (a read-only disk, another user's file), uses can't be marked either.
        try:
            try:
                os.utime(self._path, ns=(now, now))
            except FileNotFoundError:
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                os.utime(self._path, ns=(now, now))
        except OSError:
            pass
