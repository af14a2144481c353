"""The files of a ``KVStore``'s folder: their paths, atomic writes, and the lock that guards their names.

An entry is a file that never changes, so no reader can see half of one: it is written in ``tmp/`` and
renamed once it is complete and on the disk. The writer keeps its temporary file locked, which tells a
write in progress from the remains of one that died.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from voco_model.kv_store.base import logger
from voco_model.kv_store.format import VERSION, check_key, is_key
from voco_model.kv_store.index import Row
from voco_model.kv_store.locks import alone, close_locked
from voco_model.kv_store.reader import OPEN_FLAGS

SUFFIX = ".safetensors"
_ENTRY_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


class Files:
    """The files of one store.

    Args:
        root: the store's folder; created with its subfolders if it is missing.
        timeout: seconds to wait for the lock on names.
        sync: whether a write survives a power failure.

    Attributes:
        entries, tmp, quarantine: subfolders of ``root``.
    """

    def __init__(self, root: Path, *, timeout: float, sync: bool) -> None:
        self.root = root
        self.entries = root / f"v{VERSION}"
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        self.sync = sync
        self._prefix = str(self.entries) + os.sep
        self._lock = root / "files.lock"
        self._timeout = timeout
        self.make_folders()

    def make_folders(self) -> list[Path]:
        """Creates the folders that are missing, and returns them."""
        missing = [path for path in (self.entries, self.tmp, self.quarantine) if not path.is_dir()]
        for folder in missing:
            folder.mkdir(parents=True, exist_ok=True)
        return missing

    # --- names

    def path(self, key: object) -> str:
        """The path of a key's file; ValueError for anything that isn't a key."""
        check_key(key)
        return f"{self._prefix}{key[:2]}{os.sep}{key}{SUFFIX}"

    def exists(self, key: str) -> bool:
        """Whether there is a file, or a link, under a key's path."""
        return os.path.lexists(self.path(key))

    def size(self, key: str) -> int:
        """Bytes of a key's file; 0 if it can't be looked at."""
        try:
            return os.lstat(self.path(key)).st_size
        except OSError:
            return 0

    def listed(self) -> Iterator[tuple[Path, str | None]]:
        """Each file among the entries: its path, and its key if that is where the key's file belongs."""
        for shard in names_in(self.entries, folders=True):
            for name in names_in(self.entries / shard):
                match = _ENTRY_NAME.fullmatch(name)
                key = match[1] if match is not None and match[1][:2] == shard else None
                yield self.entries / shard / name, key

    def rows(self) -> Iterator[Row]:
        """The index's row for each entry, from its file."""
        logger.info("building the index of %s from its files", self.root)
        for path, key in self.listed():
            if key is None:
                continue
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode):
                    yield Row(key, status.st_size, status.st_mtime_ns)

    def lock(self, *, shared: bool = False, timeout: float | None = None) -> AbstractContextManager:
        """Holds the lock on names. Renaming a new file takes it shared; unlinking and setting aside take
        it exclusively, so that they can check which file has the name.

        Args:
            timeout: seconds; by default that of the store.

        Raises:
            StoreUnavailable: others held it for that long.
        """
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        return alone(self._lock, mode, timeout=self._timeout if timeout is None else timeout)

    # --- writing

    @contextmanager
    def temporary(self, key: str) -> Iterator[tuple[int, str]]:
        """A new file in ``tmp/``, as descriptor and path. It is locked, so that ``sweep`` leaves it
        alone, and removed at the end of the context unless ``publish`` has renamed it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            path = f"{self.tmp}{os.sep}{key}.{os.getpid()}-{secrets.token_hex(8)}"
            fd = os.open(path, flags, 0o666)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                break
            close_locked(fd)  # swept between open and lock
        try:
            yield fd, path
        finally:
            unlink(path)
            close_locked(fd)

    def write(self, fd: int, parts: list[memoryview], mtime: int) -> None:
        """Writes the parts, one after another, and sets the modification time, in nanoseconds."""
        _write_fully(fd, parts)
        os.utime(fd, ns=(mtime, mtime))
        if self.sync:
            _sync_data(fd)

    def publish(self, temporary: str, path: str) -> None:
        """Renames a temporary file to an entry's path."""
        with self.lock(shared=True):
            try:
                os.rename(temporary, path)
            except FileNotFoundError:  # the first entry of its folder
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if self.sync:
                    sync_folder(self.entries)
                os.rename(temporary, path)
        if self.sync:
            sync_folder(os.path.dirname(path))

    def sweep(self) -> list[str]:
        """Removes temporary files that no living writer has locked. Returns the keys they were for."""
        keys = []
        for name in names_in(self.tmp):
            path = self.tmp / name
            with suppress(OSError):
                fd = os.open(path, OPEN_FLAGS)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    keys.append(name.partition(".")[0])
                finally:
                    close_locked(fd)
        return list(filter(is_key, keys))


def names_in(folder: Path, *, folders: bool = False) -> list[str]:
    """The names in a folder, sorted; none if it doesn't exist.

    Args:
        folders: only names of folders.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(each.name for each in found if not folders or each.is_dir())
    except FileNotFoundError:
        return []


def unlink(path: str | Path) -> bool:
    """Removes a file. Returns whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def is_still(path: str | Path, status: os.stat_result) -> bool:
    """Whether a path still leads to the file with this status."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False


def sync_folder(path: str | Path) -> None:
    """Makes the names in a folder survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_data(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _write_fully(fd: int, parts: list[memoryview]) -> None:
    parts = list(parts)
    while parts:
        written = os.writev(fd, parts)
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]
