"""Eviction from a ``KVStore``: the least recently used entries that are not in use.

``get`` marks a use by the file's modification time, which takes a microsecond, and doesn't write to the
index. Eviction takes the rows in the index's order, and if a file is newer than its row, it corrects
the row and comes back to the entry in its turn. The result is least recently used across all processes.

Unlinking a file doesn't disturb a reader that has it open. Those that need the name as well lock the
file (shared), which keeps eviction away.
"""

from __future__ import annotations

import fcntl
import heapq
import os
from collections.abc import Iterator
from contextlib import suppress

from voco_model.kv_store.base import StoreUnavailable
from voco_model.kv_store.files import Files, is_still
from voco_model.kv_store.format import EntryError
from voco_model.kv_store.index import Row, Transaction
from voco_model.kv_store.locks import close_locked
from voco_model.kv_store.reader import open_entry
from voco_model.kv_store.use_clock import UseClock

_NEVER = -(2**63)  # before any time


def evict(
    transaction: Transaction, files: Files, clock: UseClock, limit: int, *, keep: str = ""
) -> tuple[int, int]:
    """Removes the least recently used entries until ``limit`` bytes are left, or only entries in use.

    Args:
        clock: observes the uses that are found in files.
        keep: a key whose entry stays.

    Returns:
        How many entries were removed, and how many bytes are left.

    Raises:
        StoreUnavailable: others hold the lock on names.
    """
    _, left = transaction.totals()
    if left <= limit:
        return 0, left
    queue = _Queue(transaction.oldest())
    gone: list[str] = []
    evicted = 0
    while left > limit and (row := queue.pop()) is not None:
        used = None if row.key == keep else _unlink_unused(files, row.key, row.last_used)
        if used is None:
            continue
        clock.observe(used)
        if used > row.last_used:
            queue.push_back(row, used)
            continue
        gone.append(row.key)
        evicted += used != _NEVER
        left -= row.size
    # On a full disk, the index can change only after the files have made room.
    for key in gone:
        transaction.delete(key)
    for key, used in queue.used.items():
        transaction.touch(key, used)
    return evicted, left


class _Queue:
    """Rows in the order of their last uses, corrected while they are taken.

    Attributes:
        used: the last uses that the rows didn't know, by key.
    """

    def __init__(self, rows: Iterator[Row]) -> None:
        self.used: dict[str, int] = {}
        self._rows = rows
        self._next = next(rows, None)
        self._later: list[tuple[int, str, int]] = []  # a heap: last use, key, size

    def pop(self) -> Row | None:
        """The least recently used row; None if there are no more."""
        if self._later and (self._next is None or self._later[0][0] < self._next.last_used):
            last_used, key, size = heapq.heappop(self._later)
            return Row(key, size, last_used)
        row = self._next
        if row is not None:
            self._next = next(self._rows, None)
        return row

    def push_back(self, row: Row, used: int) -> None:
        """Takes a row back that was used later. Once only, or a busy entry would never let this end."""
        if row.key not in self.used:
            self.used[row.key] = used
            heapq.heappush(self._later, (used, row.key, row.size))


def _unlink_unused(files: Files, key: str, last_used: int) -> int | None:
    """Unlinks a file unless it is in use or was used after ``last_used``.

    Returns:
        None if it is in use; its last use, if that was after ``last_used``; ``_NEVER`` if there was no
        such file; otherwise the file was unlinked, and the result is a time up to ``last_used``.

    Raises:
        StoreUnavailable: others hold the lock on names. Trying the next entry would only wait again.
    """
    path = files.path(key)
    try:
        fd = open_entry(path)
    except FileNotFoundError:
        return _NEVER
    except EntryError:  # a symbolic link: remove the link, not what it leads to
        with files.lock(), suppress(OSError):
            if os.path.islink(path):
                os.unlink(path)
        return last_used
    except OSError:
        return None  # not readable for this process, so not for it to remove
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if status.st_mtime_ns <= last_used:
            with files.lock():
                if not is_still(path, status):
                    return None  # just put again
                os.unlink(path)
        return status.st_mtime_ns
    except StoreUnavailable:
        raise
    except OSError:
        return None  # in use, in most cases
    finally:
        close_locked(fd)
