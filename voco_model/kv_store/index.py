"""``Index``: the sizes and last uses of a folder's entries, in an SQLite file.

It can be rebuilt from the entries at any time, so problems are repaired without the user: an index that
is damaged, foreign or of a newer version is renamed, and a new one is built.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from voco_model.kv_store.base import StoreUnavailable, logger
from voco_model.kv_store.locks import alone

APPLICATION_ID = 0x766F636F  # "voco"
SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE entries (
    key TEXT PRIMARY KEY,
    size INTEGER NOT NULL,      -- bytes of its file
    last_used INTEGER NOT NULL  -- nanoseconds (use_clock.py); the file's mtime may be later
) WITHOUT ROWID;
CREATE INDEX by_last_used ON entries (last_used, key, size);
-- One row, maintained by the triggers, so that totals need no scan.
CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER counted AFTER INSERT ON entries BEGIN
    UPDATE totals SET entries = entries + 1, bytes = bytes + NEW.size;
END;
CREATE TRIGGER uncounted AFTER DELETE ON entries BEGIN
    UPDATE totals SET entries = entries - 1, bytes = bytes - OLD.size;
END;
CREATE TRIGGER resized AFTER UPDATE OF size ON entries BEGIN
    UPDATE totals SET bytes = bytes + NEW.size - OLD.size;
END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_UPSERT = (
    "INSERT INTO entries VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET size = excluded.size, "
    "last_used = excluded.last_used"
)
_PAGE = 1000
_PROBE = b"\0" * (1 << 16)  # as large as the largest page of SQLite
_FORK_PATIENCE = 5.0  # seconds that a fork waits for a change in another thread
Result = TypeVar("Result")


class Row(NamedTuple):
    """What the index has about an entry: key, bytes of its file, last use in nanoseconds."""

    key: str
    size: int
    last_used: int


class Unusable(Exception):  # noqa: N818
    """The index file is no index, isn't ours, or was removed."""


class Transaction:
    """Operations on the index within a transaction, which excludes other writers."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def put(self, key: str, size: int, last_used: int) -> None:
        self._connection.execute(_UPSERT, (key, size, last_used))

    def size(self, key: str) -> int | None:
        row = self._connection.execute("SELECT size FROM entries WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def delete(self, key: str) -> None:
        self._connection.execute("DELETE FROM entries WHERE key = ?", (key,))

    def touch(self, key: str, last_used: int) -> None:
        self._connection.execute("UPDATE entries SET last_used = ? WHERE key = ?", (last_used, key))

    def totals(self) -> tuple[int, int]:
        """The number of entries, and their total bytes."""
        return self._connection.execute("SELECT entries, bytes FROM totals").fetchone()

    def oldest(self) -> Iterator[Row]:
        """The rows in the order of their last uses, read in pages."""
        after = (-(2**63), "")
        while rows := self._connection.execute(
            "SELECT key, size, last_used FROM entries WHERE (last_used, key) > (?, ?) "
            "ORDER BY last_used, key LIMIT 16",
            after,
        ).fetchall():
            for row in map(Row._make, rows):
                after = (row.last_used, row.key)
                yield row


class Index:
    """The index of one folder, for any number of threads and processes.

    Every method raises StoreUnavailable if others keep the index locked for ``timeout`` seconds, and
    OSError if the disk is full or can't be written.

    Args:
        path: of the SQLite file.
        scan: returns the rows of all entries from their files; called only if the index is missing or
            unusable.
        timeout: seconds to wait for other threads and processes.
        sync: whether a change survives a power failure.

    Attributes:
        rebuilt: how often this handle had to rebuild the index.

    Raises:
        OSError: the folder can't be written, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        scan: Callable[[], Iterable[Row]],
        *,
        timeout: float = 30.0,
        sync: bool = True,
    ) -> None:
        self.path = path
        self.rebuilt = 0
        self._scan = scan
        self._timeout = timeout
        self._sync = sync
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._owner = 0  # id of the thread that holds the lock
        self._unusable_child = False
        _indexes.add(self)
        try:
            self.totals()  # opens it, and builds it if it is missing
        except StoreUnavailable as error:
            logger.warning("%s; entries can be read nevertheless", error)

    @contextmanager
    def _locked(self, timeout: float) -> Iterator[None]:
        """Holds the lock that excludes other threads.

        Raises:
            StoreUnavailable: they held it for ``timeout`` seconds.
        """
        if not self._lock.acquire(timeout=timeout):
            raise StoreUnavailable(
                f"other threads of this process kept the index {self.path} for {timeout} s"
            )
        lock, self._owner = self._lock, threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            lock.release()

    def _renew(self, quiet: bool) -> None:
        """In a forked child. ``quiet`` tells that no thread of the parent was using the index."""
        self._lock = threading.Lock()
        self._owner = 0
        if self._connection is not None:
            # SQLite forbids using the parent's connection in a child. Even closing it, as the garbage
            # collector would, could roll back a change that the parent is making. So it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            self._connection = None
        # SQLite also keeps its locks in memory, by file. Those of a change by another thread of the
        # parent would count as this process's own.
        self._unusable_child = self._unusable_child or not quiet

    def close(self) -> None:
        with self._locked(self._timeout):
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    # --- contents

    def change(self, do: Callable[[Transaction], Result]) -> Result:
        """Runs ``do(transaction)`` atomically, and returns its result.

        ``do`` may be called a second time if the index turns out to be unusable.
        """
        return self._run(lambda connection: self._transact(connection, do))

    def _transact(
        self, connection: sqlite3.Connection, do: Callable[[Transaction], Result]
    ) -> Result:
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_in_place()
            result = do(Transaction(connection))
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return result

    def try_change(self, do: Callable[[Transaction], Any], wait: float) -> bool:
        """As ``change``, but gives up after ``wait`` seconds, or on any error. Returns whether it was
        done."""
        try:
            with self._locked(wait):
                if self._connection is None:
                    return False
                self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * wait)}")
                try:
                    self._transact(self._connection, do)
                finally:
                    self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * self._timeout)}")
                return True
        except (sqlite3.Error, Unusable, OSError):
            return False  # the next change will find and report the cause

    def totals(self) -> tuple[int, int]:
        """The number of entries, and their total bytes."""
        return self._select("SELECT entries, bytes FROM totals")[0]

    def keys(self) -> Iterator[str]:
        """All keys, in order; read in pages, so that a slow consumer keeps no lock."""
        after = ""
        while page := self._select(
            f"SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT {_PAGE}", after
        ):
            for (after,) in page:
                yield after

    def newest(self) -> int:
        """The latest use in the index; 0 if it is empty."""
        return self._select("SELECT COALESCE(MAX(last_used), 0) FROM entries")[0][0]

    def check(self) -> None:
        """Checks the whole index, and rebuilds it if it is damaged."""

        def run(connection: sqlite3.Connection) -> None:
            answers = connection.execute("PRAGMA integrity_check(1)").fetchall()
            if answers != [("ok",)]:
                raise sqlite3.DatabaseError(f"integrity_check returned {answers}")

        self._run(run)

    def _select(self, query: str, *arguments) -> list[tuple]:
        def run(connection: sqlite3.Connection) -> list[tuple]:
            self._check_in_place()
            return connection.execute(query, arguments).fetchall()

        return self._run(run)

    # --- opening and rebuilding

    def _run(self, do: Callable[[sqlite3.Connection], Result]) -> Result:
        """Runs ``do(connection)``, and once more with a new index if this one turns out to be
        unusable."""
        if self._unusable_child:
            raise StoreUnavailable(
                f"this process was forked while another thread was changing the index {self.path}, "
                "whose locks SQLite can't tell from its own; fork earlier, or start processes by spawn"
            )
        with self._locked(self._timeout):
            for last in (False, True):
                try:
                    if self._connection is None:
                        self._open()
                    return do(self._connection)
                except Unusable as error:
                    problem: Exception = error
                except sqlite3.Error as error:
                    if not _is_damage(error):
                        raise self._as_os_error(error) from error
                    problem = error
                self._close()
                if last:
                    break
                self._open(problem)
            raise StoreUnavailable(
                f"the index {self.path} is still unusable after being rebuilt: {problem}"
            ) from problem

    def _check_in_place(self) -> None:
        """Raises ``Unusable`` unless the open file is still the one under this path."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError as error:
            raise Unusable("it was removed") from error
        if (status.st_dev, status.st_ino) != self._inode:
            raise Unusable("another process has replaced it")

    def _open(self, problem: Exception | None = None) -> None:
        """Opens the index, and rebuilds it if it is missing or unusable.

        Args:
            problem: by which it turned out to be unusable.
        """
        damaged = self._inode if problem is not None and _is_damage(problem) else None
        with alone(self.path.with_suffix(".lock"), timeout=self._timeout):
            try:
                # Others may have replaced the damaged file before this process got the lock.
                if damaged is not None and _inode(self.path) == damaged:
                    raise Unusable(str(problem))
                self._connect()
            except (Unusable, sqlite3.Error) as error:
                self._close()
                if isinstance(error, sqlite3.Error) and not _is_damage(error):
                    raise self._as_os_error(error) from error
                existed = self._set_aside(error)
                self._rebuild()
                self._connect()
                # A new store has no entries to rebuild from.
                if existed or self._connection.execute("SELECT entries FROM totals").fetchone()[0]:
                    self.rebuilt += 1

    def _connect(self) -> None:
        inode = _inode(self.path)
        if inode is None:
            raise Unusable("it is missing")
        self._connection = self._connect_to(self.path)
        self._inode = inode
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if (application_id, version) != (APPLICATION_ID, SCHEMA_VERSION):
            raise Unusable(
                f"its application_id is {application_id:#x} and its version {version}, not "
                f"{APPLICATION_ID:#x} and {SCHEMA_VERSION}"
            )
        if len(self._connection.execute("SELECT * FROM totals").fetchall()) != 1:
            raise Unusable("its table of totals doesn't have exactly one row")
        # Unlike WAL, a rollback journal has no shared memory that a crash could leave behind. DELETE is
        # the default, but the file may say otherwise.
        self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.execute(f"PRAGMA synchronous = {'NORMAL' if self._sync else 'OFF'}")

    def _connect_to(self, path: Path) -> sqlite3.Connection:
        # Autocommit; usable from any thread, one at a time.
        return sqlite3.connect(
            path, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )

    def _set_aside(self, problem: Exception) -> bool:
        """Renames the index, and its journal first: SQLite would roll that back into the next one.

        Returns:
            Whether there was an index.
        """
        for older in self.path.parent.glob(f"{self.path.name}.set-aside-*"):
            older.unlink(missing_ok=True)  # keep one for inspection
        existed = False
        name = f"{self.path.name}.set-aside-{secrets.token_hex(4)}"
        for suffix in ("-journal", "-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{self.path.with_name(name)}{suffix}")
                existed = existed or suffix == ""
        if existed:
            logger.warning("set the index %s aside as %s: %s", self.path, name, problem)
        return existed

    def _rebuild(self) -> None:
        """Builds the index from the files, under another name until it is complete."""
        for left_behind in self.path.parent.glob(f"{self.path.name}.new-*"):
            left_behind.unlink(missing_ok=True)
        new = self.path.with_name(f"{self.path.name}.new-{secrets.token_hex(4)}")
        try:
            with closing(self._connect_to(new)) as connection:
                connection.executescript(f"BEGIN; {_SCHEMA}")
                connection.executemany(_UPSERT, self._scan())
                connection.execute("COMMIT")
            os.rename(new, self.path)
        except BaseException:
            for path in (new, f"{new}-journal"):
                with suppress(FileNotFoundError):
                    os.unlink(path)
            raise

    def _as_os_error(self, error: sqlite3.Error) -> OSError:
        message = str(error)
        if "locked" in message or "busy" in message:
            return StoreUnavailable(
                f"the index {self.path} was not available within {self._timeout} s: {message}"
            )
        if "readonly" in message:
            return PermissionError(errno.EACCES, message, str(self.path))
        if "full" in message:
            return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {message}", str(self.path))
        # SQLite reports an exhausted quota, or a lack of inodes or descriptors, like a broken disk.
        cause = _why_not_written(self.path.parent)
        if cause is None:
            return OSError(errno.EIO, message, str(self.path))
        return OSError(cause.errno, f"{cause.strerror}: {message}", str(self.path))


def _why_not_written(folder: Path) -> OSError | None:
    """The system's error for writing a new file in a folder; None if that works."""
    path = folder / f"index.probe-{secrets.token_hex(4)}"
    try:
        with open(path, "xb", buffering=0) as file:
            file.write(_PROBE)
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            os.unlink(path)
    return None


def _is_damage(error: Exception) -> bool:
    """Whether rebuilding the index helps. It doesn't if the index is locked or the disk fails."""
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    if not isinstance(error, sqlite3.OperationalError):
        return True  # "file is not a database", "database disk image is malformed"
    return str(error).startswith(("no such table", "no such column", "no such index", "table "))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


# --- forks

_indexes: weakref.WeakSet[Index] = weakref.WeakSet()
_quiet: list[tuple[Index, threading.Lock | None]] = []  # filled while a thread forks


def _before_fork() -> None:
    """Waits for running changes, because a child couldn't use the index in the middle of one."""
    end = time.monotonic() + _FORK_PATIENCE
    for index in list(_indexes):
        lock: threading.Lock | None = index._lock
        own = index._owner == threading.get_ident()
        if own or not lock.acquire(timeout=max(end - time.monotonic(), 0)):
            lock = None
        _quiet.append((index, lock))


def _after_fork_in_parent() -> None:
    while _quiet:
        _, lock = _quiet.pop()
        if lock is not None:
            lock.release()


def _after_fork_in_child() -> None:
    while _quiet:
        index, lock = _quiet.pop()
        index._renew(quiet=lock is not None)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
