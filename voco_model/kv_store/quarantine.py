"""Entries that a ``KVStore`` doesn't serve: counted, logged, and set aside if their files are bad."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from voco_model.kv_store.base import Tally, logger
from voco_model.kv_store.files import SUFFIX, Files, is_still, names_in
from voco_model.kv_store.format import EntryError
from voco_model.kv_store.rows import DISCARD_PATIENCE, Rows
from voco_model.kv_store.use_clock import UseClock


class Quarantine:
    """The store's ``quarantine/`` folder; what was set aside first is removed first.

    Args:
        max_bytes: of the files in it.
        tally: counts what isn't served and what is set aside.
    """

    def __init__(
        self, files: Files, rows: Rows, clock: UseClock, tally: Tally, *, max_bytes: int
    ) -> None:
        self.max_bytes = max_bytes
        self._files = files
        self._rows = rows
        self._clock = clock
        self._tally = tally

    def refuse(self, key: str, error: Exception, fd: int | None = None, *, misses: int = 1) -> str:
        """Counts and logs an entry that isn't served, and sets its file aside if it is bad.

        Args:
            error: what was wrong: EntryError for the entry itself; otherwise the disk or the memory.
            fd: the entry's open file; None if it couldn't be opened, which for an EntryError means that
                there is a symbolic link in its place.
            misses: to count.

        Returns:
            The reason, as in ``StoreStats.failures``.
        """
        bad_entry = isinstance(error, EntryError)
        reason = error.reason if bad_entry else "unreadable"
        bad_disk = fd is not None and getattr(error, "errno", None) == errno.EIO
        # Another model's entry is intact, and served by that model's store.
        if (bad_entry and reason != "model") or bad_disk:
            name = f"{key}.{reason}"
            fate = self.set_aside(self._files.path(key), name, fd=fd, link=fd is None)
            self._rows.try_drop([key])
        else:
            fate = "it was left in place"
        self._tally.add(failure=reason, misses=misses)
        text = str(error) if bad_entry else f"unreadable: {error}"
        logger.warning("entry %s is not served: %s; %s", key, text, fate)
        return reason

    def set_aside(
        self, path: str | Path, name: str, *, fd: int | None = None, link: bool = False
    ) -> str:
        """Moves a file to the quarantine, unless another one has taken its path.

        Args:
            name: of the file there, which gets a suffix that makes it unique.
            fd: an open file; only this one is moved.
            link: only a symbolic link is moved.

        Returns:
            What was done, for the log.
        """
        target = self._files.quarantine / f"{name[:128]}.{secrets.token_hex(4)}{SUFFIX}"
        try:
            with self._files.lock(timeout=DISCARD_PATIENCE):
                replaced = fd is not None and not is_still(path, os.fstat(fd))
                if replaced or (link and not os.path.islink(path)):
                    return "another file has replaced it"
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, target)
        except OSError as error:
            return f"setting it aside failed: {error}"
        self._tally.add(quarantined=1)
        now = self._clock.now()
        with suppress(OSError, NotImplementedError):
            os.utime(target, ns=(now, now), follow_symlinks=False)
        self.trim(self.max_bytes)
        if not os.path.lexists(target):
            return "it was removed, being larger than quarantine_bytes"
        return f"it was moved to {target}"

    def trim(self, limit: int) -> None:
        """Removes files, oldest first, until at most ``limit`` bytes are left."""
        found = []
        for name in names_in(self._files.quarantine):
            path = self._files.quarantine / name
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                found.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= limit:
                break
            with suppress(OSError):
                os.unlink(path)
            left -= size
