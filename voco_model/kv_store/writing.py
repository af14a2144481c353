"""Writing entries into a ``KVStore``'s folder, and evicting others to make room."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from voco_model.kv_store.base import Tally, logger
from voco_model.kv_store.eviction import evict
from voco_model.kv_store.files import Files
from voco_model.kv_store.index import Index, Transaction
from voco_model.kv_store.rows import Rows
from voco_model.kv_store.use_clock import UseClock

# Room that a full disk needs beyond the entry: index pages, its journal, rounding of file sizes.
INDEX_ROOM = 1 << 16  # bytes
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Writer:
    """Writes entries to one store.

    Args:
        tally: counts evictions, and puts that left the store overfull.
    """

    def __init__(
        self, files: Files, index: Index, rows: Rows, clock: UseClock, tally: Tally
    ) -> None:
        self._files = files
        self._index = index
        self._rows = rows
        self._clock = clock
        self._tally = tally

    def write(self, key: str, parts: list[memoryview], size: int, max_bytes: int) -> None:
        """Writes an entry's file, and evicts others if the store then exceeds ``max_bytes``.

        If the disk is full (bytes, inodes or a quota), enough entries are evicted for this one, and it
        is tried once more; likewise if a folder was removed.

        Args:
            parts: the file's contents, ``size`` bytes in all.

        Raises:
            OSError: ENOSPC, for instance; StoreUnavailable if a lock isn't free in time.
        """
        repaired: set[str] = set()  # each once
        while True:
            try:
                self._write(key, parts, size, max_bytes)
                return
            except OSError as error:
                if error.errno in _DISK_FULL and "room" not in repaired:
                    repaired.add("room")
                    self.make_room(size, max_bytes, error)
                elif error.errno == errno.ENOENT and "folders" not in repaired:
                    repaired.add("folders")
                    for folder in self._files.make_folders():
                        logger.warning(
                            "%s was removed while the store was open; created it again", folder
                        )
                else:
                    raise

    def make_room(self, size: int, max_bytes: int, full: OSError) -> None:
        """Evicts ``size`` bytes, and some for the index, from a disk that is full."""
        logger.warning("%s: no room for %d bytes on the disk (%s)", self._files.root, size, full)
        self.sweep()
        wanted = size + INDEX_ROOM
        for _ in range(2):  # the index may find no room itself until files have been removed
            try:
                self._change(lambda t: self._evict(t, t.totals()[1] - wanted), max_bytes)
                return
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise

    def sweep(self) -> None:
        """Removes what dead writers left behind, and their rows."""
        if keys := self._files.sweep():
            self._rows.try_drop(keys)

    def _write(self, key: str, parts: list[memoryview], size: int, max_bytes: int) -> None:
        path = self._files.path(key)
        now = self._clock.now()

        def enter(transaction: Transaction, size: int = size, used: int = now) -> tuple[int, int]:
            transaction.put(key, size, used)
            return self._evict(transaction, max_bytes, keep=key)

        def settle(transaction: Transaction) -> tuple[int, int] | None:
            """Makes the row describe the present file, if there still is one."""
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                return None  # replaced by another put, and then evicted or deleted
            if transaction.size(key) == status.st_size:
                return None
            return enter(transaction, status.st_size, status.st_mtime_ns)

        with self._files.temporary(key) as (fd, temporary):
            self._files.write(fd, parts, now)
            # The row comes first: eviction would never find a file without one.
            self._change(enter, max_bytes)
            self._files.publish(temporary, path)
            # Others may have removed the row since (an eviction that saw no file yet, a delete of the
            # previous entry, a new index) or put the same key. This transaction runs after theirs.
            self._change(settle, max_bytes)

    def _evict(self, transaction: Transaction, limit: int, keep: str = "") -> tuple[int, int]:
        return evict(transaction, self._files, self._clock, limit, keep=keep)

    def _change(self, do: Callable[[Transaction], tuple[int, int] | None], max_bytes: int) -> None:
        """A change of the index that may evict; counts the evictions once it is committed."""
        evicted, left = self._index.change(do) or (0, 0)
        self._tally.add(evictions=evicted, overfull=int(left > max_bytes))
        if left > max_bytes:
            logger.warning(
                "%s holds %d bytes, more than max_bytes = %d, because all other entries are in use",
                self._files.root,
                left,
                max_bytes,
            )
