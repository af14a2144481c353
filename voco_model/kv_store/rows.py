"""The rows of a ``KVStore``'s index, brought into agreement with its files.

A file's row is written before the file gets its name, so no file is ever without a row for eviction to
find, whenever a process dies. A row without a file does no harm; it goes when one of these functions, or
eviction, meets it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from contextlib import suppress

from voco_model.kv_store.files import Files
from voco_model.kv_store.format import is_key
from voco_model.kv_store.index import Index, Transaction

BATCH = 1000  # rows that one transaction compares with their files
# Seconds that a miss waits for the index, merely to drop the row of a bad entry.
DISCARD_PATIENCE = 0.05


class Rows:
    """The rows of one store."""

    def __init__(self, index: Index, files: Files) -> None:
        self._index = index
        self._files = files

    def drop_missing(self) -> list[str]:
        """Drops all rows without files, and returns their keys."""
        keys = self._index.keys()
        dropped: list[str] = []
        # A put that is about to rename a file writes its row again afterwards.
        while batch := list(itertools.islice(keys, BATCH)):
            dropped += self._index.change(lambda t, batch=batch: self._drop(t, batch))
        return dropped

    def try_drop(self, keys: Iterable[str]) -> None:
        """Drops those of these rows that have no files, unless the index is busy."""
        self._index.try_change(lambda t: self._drop(t, keys), DISCARD_PATIENCE)

    def add(self, keys: list[str]) -> list[str]:
        """Writes the rows of files that the index doesn't have, or has with another size.

        Returns:
            The keys of these.
        """

        def add(transaction: Transaction) -> list[str]:
            added = []
            for key in keys:
                with suppress(FileNotFoundError):
                    status = os.lstat(self._files.path(key))
                    if transaction.size(key) != status.st_size:
                        transaction.put(key, status.st_size, status.st_mtime_ns)
                        added.append(key)
            return added

        return self._index.change(add) if keys else []

    def _drop(self, transaction: Transaction, keys: Iterable[str]) -> list[str]:
        gone = [
            key
            for key in keys
            if is_key(key) and transaction.size(key) is not None and not self._files.exists(key)
        ]
        for key in gone:
            transaction.delete(key)
        return gone
