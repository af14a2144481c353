"""``KVStore``: entries in a folder of the local disk, for any number of processes.

The folder::

    v1/ab/<key>.safetensors   entries of version 1 of the format, in 256 folders by their key
    tmp/                      entries while they are written, each locked by its writer
    quarantine/               what was there and wasn't an intact entry; the oldest goes first
    index.sqlite              sizes and last uses (index.py)
    index.lock, files.lock    held while the index is made, and while a file is renamed or unlinked
    clock                     its mtime is how far the time of uses has come (use_clock.py)

All of it but the entries is made again if it's removed, also beneath an open store; a symbolic link in
the place of an entry is never followed.

An entry is a file that never changes, so there is nothing that a reader could see half written: it is
written in ``tmp/`` and renamed when it's whole and on the disk. Its row is in the index before the
rename: so no file is ever without a row for eviction to find, whenever a process dies. A row without
a file does no harm, and goes with the next eviction, ``verify`` or put that meets it.

A reader asks the path and not the index, and marks the use by the file's mtime, which costs a
microsecond. An unlink doesn't harm who has a file open; ``hold``, and who reads piece by piece, lock it
(shared), which keeps eviction away. Eviction takes rows in the order of the index, and where
a file's mtime is newer than its row, it corrects the row and goes on: least recently used, among all
processes, without a write to the index in ``get``. The times are those of a ``UseClock``, which
a wrong system clock doesn't turn back.

No lock is waited for longer than ``index_timeout``, since a process may be stopped while it holds one.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    key_of,
    logger,
    rows_of_keys,
)
from voco_model.kv_store.buffers import BufferPool
from voco_model.kv_store.format import VERSION, EntryError, Header, check_key, encode
from voco_model.kv_store.index import Index, Row, Transaction
from voco_model.kv_store.loading import STREAMED_FROM, load_from_files
from voco_model.kv_store.locks import alone, close_locked
from voco_model.kv_store.reader import (
    OPEN_FLAGS,
    EntryReader,
    mark_used,
    open_entry,
    read_entry,
)
from voco_model.kv_store.use_clock import UseClock

_SUFFIX = ".safetensors"
_ENTRY_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
# On a full disk: new pages of the index, its journal, and what files take beyond their size.
_INDEX_ROOM = 1 << 16  # bytes
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A miss doesn't wait long for the index, which is only told that a bad entry is gone.
_DISCARD_PATIENCE = 0.05  # seconds
_NEVER = -(2**63)  # before any time
_VERIFY_BATCH = 1000  # rows that one transaction compares with their files


@dataclass
class DiskStats(StoreStats):
    """``StoreStats`` of a ``KVStore``.

    Attributes:
        evictions: entries removed for room.
        quarantined: files set aside because they weren't intact entries.
        overfull: puts that left more than max_bytes behind, since all else was in use.
        index_rebuilds: how often the index was made from the files.
        unpooled: reads for which the pool of buffers had no room.
    """

    evictions: int = 0
    quarantined: int = 0
    overfull: int = 0
    index_rebuilds: int = 0
    unpooled: int = 0


@dataclass
class VerifyReport:
    """What ``KVStore.verify`` found, and put right.

    Attributes:
        entries, bytes: that are intact.
        bad: keys (or names, where a file isn't named by a key) and why they were set aside.
        added: keys of files that the index didn't know, or not with their size.
        dropped: keys that the index knew and that have no file.
    """

    entries: int = 0
    bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there was nothing to put right."""
        return not (self.bad or self.added or self.dropped)


class KVStore(Store):
    """Compact entries in a folder, up to a number of bytes; the least recently used go first.

    Any number of processes and threads may use one folder at a time, by ``KVStore``s of their own or one
    from before a fork. The folder wants a local file system, one with ``flock``.

    Args:
        path: the folder; made if it isn't there.
        max_bytes: of all entries together, by the sizes of their files; all processes should say the
            same. Not counted: entries while they are written, the index (about 300 bytes an entry),
            and ``quarantine_bytes``.
        fingerprint: of the model whose entries are kept and served; None: of any.
        fsync: whether an entry that was put survives a power cut. It survives a crash of the process
            either way.
        quarantine_bytes: of what is set aside; ``max_bytes // 16`` by default.
        buffers: memory to read into; one's own by default, of up to 256 MiB.
        index_timeout: seconds that ``put`` and ``delete`` wait for each lock that others have.

    Raises:
        ValueError: arguments that don't fit.
        OSError: a folder that can't be made or written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        max_bytes: int,
        fingerprint: str | None = None,
        fsync: bool = True,
        quarantine_bytes: int | None = None,
        buffers: BufferPool | None = None,
        index_timeout: float = 30.0,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("quarantine_bytes", quarantine_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"expected {name} as an int, got {value!r}")
        if max_bytes <= 0 or (quarantine_bytes is not None and quarantine_bytes < 0):
            raise ValueError(
                f"expected max_bytes above 0 and quarantine_bytes of 0 or more, got {max_bytes} and "
                f"{quarantine_bytes}"
            )
        self.path = Path(path).absolute()
        self.max_bytes = max_bytes
        self.fingerprint = fingerprint
        self.quarantine_bytes = max_bytes // 16 if quarantine_bytes is None else quarantine_bytes
        self._fsync = fsync
        self.buffers = BufferPool() if buffers is None else buffers
        self._entries = self.path / f"v{VERSION}"
        self._prefix = str(self._entries) + os.sep
        self._tmp = self.path / "tmp"
        self._quarantine = self.path / "quarantine"
        self._files_lock = self.path / "files.lock"
        self._timeout = index_timeout
        self._make_folders()
        self._clock = UseClock(self.path / "clock")
        self._tally = Tally(DiskStats())
        self._closed = False
        self._index = Index(
            self.path / "index.sqlite", self._scan, timeout=index_timeout, sync=fsync
        )
        with suppress(StoreUnavailable):  # which the index has said already
            self._clock.observe(self._index.newest())
        self._sweep()

    @staticmethod
    def open(url: str, **options) -> Store:
        """The store that a URL names; see ``voco_model.kv_store.open``."""
        from voco_model.kv_store.open import open_store

        return open_store(url, **options)

    def __repr__(self) -> str:
        return f"KVStore({str(self.path)!r}, max_bytes={self.max_bytes})"

    # --- reading

    def get(self, key: str) -> CompactKV | None:
        self._check_open()
        path = self._path(key)
        try:
            fd = open_entry(path)
        except FileNotFoundError:
            self._tally.add(misses=1)
            return None
        except (EntryError, OSError) as error:
            self._not_opened(key, error)
            return None
        try:
            # Without a lock: an eviction would unlink the file, and leave us what we read. Marked first,
            # it is the least likely to be evicted meanwhile.
            mark_used(fd, self._clock.now())
            entry, size = read_entry(fd, self.buffers, key, self.fingerprint)
        except (EntryError, OSError, MemoryError) as error:
            self._not_served(key, fd, error)
            return None
        finally:
            os.close(fd)
        self._tally.add(hits=1, bytes_read=size)
        return entry

    @contextmanager
    def reader(self, key: str) -> Iterator[EntryReader | None]:
        """An entry to read a few layers at a time, straight to where it is wanted; None if it's a miss.

        The reader is started (``EntryReader.start``), and whatever it raises in the context is dealt
        with as in ``get``, and raised: the layers that were read are not to be used then.

        Raises:
            EntryError, OSError: while reading, from within the context.
        """
        self._check_open()
        reader = self._opened(key)
        if reader is None:
            yield None
            return
        with reader:
            try:
                yield reader
            except EntryError as error:
                self._not_served(key, reader.fd, error)
                raise
            except OSError as error:
                # The caller's own are none of our business; a disk that fails is.
                if error.errno == errno.EIO:
                    self._not_served(key, reader.fd, error)
                raise
            mark_used(reader.fd, self._clock.now())
        self._tally.add(hits=1, bytes_read=reader.header.file_size)

    def _opened(self, key: str) -> EntryReader | None:
        """A reader that is started; None, counted and logged, if it's a miss."""
        try:
            reader = EntryReader(self._path(key), self.buffers)
        except FileNotFoundError:
            self._tally.add(misses=1)
            return None
        except (EntryError, OSError) as error:
            self._not_opened(key, error)
            return None
        try:
            reader.start(key=key, fingerprint=self.fingerprint)
        except (EntryError, OSError) as error:
            self._not_served(key, reader.fd, error)
            reader.close()
            return None
        return reader

    def outline(self, key: str) -> tuple[CompactKV, Header] | None:
        """An entry with ``kv`` on the meta device, and its header; None if it's a miss.

        It isn't counted as a use, nor to be relied on before the file was read to its end.
        """
        self._check_open()
        reader = self._opened(key)
        if reader is None:
            return None
        with reader:
            return reader.outline()[0], reader.header

    def load_into(
        self, cache: Any, keys: str | Sequence[str | Sequence[str]], **placement
    ) -> list[str]:
        """As ``Store.load_into``; large entries without a stop on the way: pieces of a file are read,
        hashed and put in their place one after another."""
        rows = rows_of_keys(keys)
        sizes = [self._size(key) for row in rows for key in row]
        if max(sizes, default=0) < STREAMED_FROM:
            return super().load_into(cache, rows, **placement)
        return load_from_files(self, cache, rows, placement)

    def _size(self, key: str) -> int:
        try:
            return os.lstat(self._path(key)).st_size
        except OSError:
            return 0

    def prefetch(self, keys: Iterable[str]) -> None:
        """Has the kernel read these files into its page cache, while we go on."""
        for path in map(self._path, keys):
            with suppress(OSError):
                fd = os.open(path, OPEN_FLAGS)
                try:
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(fd)

    @contextmanager
    def hold(self, key: str) -> Iterator[bool]:
        try:
            reader = EntryReader(self._path(key))
        except (EntryError, OSError):
            yield False
            return
        with reader:
            yield True

    # --- writing

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """As ``Store.put``. It returns when the entry is on the disk, under its name.

        Where the disk is full (its bytes, its inodes or a quota), as many bytes of entries as it needs
        are evicted, and it is tried once more; so it is where a folder was removed.

        Raises:
            ValueError: also an entry larger than max_bytes.
            OSError: also ENOSPC; StoreUnavailable where a lock isn't free for ``index_timeout``.
        """
        self._check_open()
        key = key_of(entry, key, self.fingerprint)
        parts = [memoryview(part) for part in encode(entry, key)]
        size = sum(map(len, parts))
        if size > self.max_bytes:
            raise ValueError(
                f"expected an entry of up to max_bytes = {self.max_bytes} bytes, got {size}; open "
                "the store with more, or quantize the entry"
            )
        mended: set[str] = set()  # once each
        try:
            while True:
                try:
                    self._put(key, parts, size)
                    break
                except OSError as error:
                    if error.errno in _DISK_FULL and "room" not in mended:
                        mended.add("room")
                        self._make_room(size, error)
                    elif error.errno == errno.ENOENT and "folders" not in mended:
                        mended.add("folders")
                        self._make_folders()
                    else:
                        raise
        except OSError:
            self._tally.add(put_failures=1)
            raise
        self._tally.add(puts=1, bytes_written=size)

    def delete(self, key: str) -> bool:
        self._check_open()
        path = self._path(key)

        def delete(transaction: Transaction) -> bool:
            existed = _unlink(path)
            transaction.delete(key)
            return existed

        existed = self._index.change(delete)
        self._tally.add(deletes=int(existed))
        return existed

    def clear(self) -> None:
        """Deletes every entry, and what is in quarantine."""
        self._check_open()

        def clear(transaction: Transaction) -> int:
            count = 0
            for row in transaction.oldest():
                count += _unlink(self._path(row.key))
                transaction.delete(row.key)
            return count

        self._tally.add(deletes=self._index.change(clear))
        self._trim_quarantine(0)

    # --- what there is

    def __contains__(self, key: object) -> bool:
        return os.path.lexists(self._path(key))

    def header(self, key: str) -> Header:
        """What an entry's header says, with its checksum not compared, and the use not marked.

        Raises:
            FileNotFoundError: there is none.
            EntryError: it isn't an entry of that key.
        """
        with EntryReader(self._path(key)) as reader:
            return reader.start(key=key)

    def last_used(self, key: str) -> int:
        """When an entry was put or served last, in nanoseconds since the epoch; or FileNotFoundError."""
        return os.stat(self._path(key)).st_mtime_ns

    def __iter__(self) -> Iterator[str]:
        self._check_open()
        return self._index.keys()

    def __len__(self) -> int:
        self._check_open()
        return self._index.totals()[0]

    def stats(self) -> DiskStats:
        """Counters since this handle was opened; entries and bytes as the index knows them, now."""
        self._check_open()
        entries, nbytes = self._index.totals()
        return self._tally.read(
            entries=entries,
            bytes=nbytes,
            max_bytes=self.max_bytes,
            index_rebuilds=self._index.rebuilt,
            unpooled=self.buffers.unpooled,
        )

    def verify(self) -> VerifyReport:
        """Reads every byte of the store. Bad files are set aside, and the index is put right.

        Others may go on using the store. Uses are not marked, and nothing is evicted.

        Raises:
            OSError: the index can't be written, or the folder can't be listed.
        """
        self._check_open()
        report = VerifyReport()
        self._sweep()
        self._index.check()
        batch: list[str] = []
        for shard, name in self._files():
            match = _ENTRY_NAME.fullmatch(name)
            if match is None or match[1][:2] != shard:
                path = self._entries / shard / name
                report.bad[name] = "foreign"
                where = self._set_aside(path, None, name)
                logger.warning("%s has no name of an entry: %s", path, where)
                continue
            try:
                with EntryReader(self._path(match[1]), self.buffers) as reader:
                    try:
                        header = reader.start(key=match[1])
                        for _ in reader.layers():
                            pass
                    except (EntryError, OSError) as error:
                        report.bad[match[1]] = getattr(error, "reason", "unreadable")
                        self._not_served(match[1], reader.fd, error, misses=0)
                        continue
            except FileNotFoundError:  # evicted meanwhile
                continue
            except (EntryError, OSError) as error:
                report.bad[match[1]] = getattr(error, "reason", "unreadable")
                self._not_opened(match[1], error, misses=0)
                continue
            report.entries += 1
            report.bytes += header.file_size
            batch.append(match[1])
            if len(batch) == _VERIFY_BATCH:
                report.added += self._reconcile(batch)
                batch = []
        report.added += self._reconcile(batch)
        report.dropped = self._drop_rows_without_files(self._index.keys())
        return report

    def close(self) -> None:
        self._closed = True
        self._index.close()

    # --- paths

    def _path(self, key: object) -> str:
        check_key(key)
        return f"{self._prefix}{key[:2]}{os.sep}{key}{_SUFFIX}"

    def _files(self) -> Iterator[tuple[str, str]]:
        """The folder and the name of each file that is where entries are."""
        for shard in _names(self._entries, folders=True):
            for file in _names(self._entries / shard):
                yield shard, file

    def _scan(self) -> Iterator[Row]:
        """The rows of all entries, from their files."""
        logger.info("making the index of %s from its files", self.path)
        for shard, name in self._files():
            match = _ENTRY_NAME.fullmatch(name)
            if match is not None and match[1][:2] == shard:
                with suppress(FileNotFoundError):
                    status = os.lstat(self._entries / shard / name)
                    if stat.S_ISREG(status.st_mode):
                        yield Row(match[1], status.st_size, status.st_mtime_ns)

    def _make_folders(self) -> None:
        """Makes what there isn't of the folders, and says so where it was there before."""
        opened = hasattr(self, "_index")
        for folder in (self._entries, self._tmp, self._quarantine):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                if opened:
                    logger.warning(
                        "%s was removed beneath the open store; it is made again", folder
                    )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"expected an open store, got {self} after close(); open it again")

    # --- putting

    def _put(self, key: str, parts: list[memoryview], size: int) -> None:
        path = self._path(key)
        now = self._clock.now()
        with self._temporary(key) as (fd, temporary):
            _write_fully(fd, parts)
            os.utime(fd, ns=(now, now))
            if self._fsync:
                _data_sync(fd)
            # The row comes first: a file without one would escape eviction.
            self._change(lambda transaction: self._enter(transaction, key, size, now))
            with alone(self._files_lock, fcntl.LOCK_SH, timeout=self._timeout):
                self._rename(temporary, path)
            if self._fsync:
                _sync_folder(os.path.dirname(path))
            # Others may have removed the row since: an eviction that met it before its file was there, a
            # delete of the entry that was there before, a new index. Or written theirs, if they put
            # the same key. Waiting for our turn to look makes sure that they are done.
            self._change(lambda transaction: self._settle(transaction, key, path))

    def _settle(self, transaction: Transaction, key: str, path: str) -> tuple[int, int] | None:
        """Makes the row of a key say what its file is now, if it still has one."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None  # replaced by another's put, and evicted or deleted after that
        if transaction.size(key) == status.st_size:
            return None
        return self._enter(transaction, key, status.st_size, status.st_mtime_ns)

    def _enter(self, transaction: Transaction, key: str, size: int, now: int) -> tuple[int, int]:
        transaction.put(key, size, now)
        return self._evict(transaction, self.max_bytes, keep=key)

    def _change(self, do) -> None:
        """A change of the index that may evict, and is counted when it's done."""
        evicted, left = self._index.change(do) or (0, 0)
        self._tally.add(evictions=evicted, overfull=int(left > self.max_bytes))
        if left > self.max_bytes:
            logger.warning(
                "%s holds %d bytes, more than its %d, since all other entries are in use",
                self.path,
                left,
                self.max_bytes,
            )

    @contextmanager
    def _temporary(self, key: str) -> Iterator[tuple[int, str]]:
        """A new file in ``tmp/``, locked, so that no sweep takes it for one whose writer died."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            path = f"{self._tmp}{os.sep}{key}.{os.getpid()}-{secrets.token_hex(8)}"
            fd = os.open(path, flags, 0o666)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                break
            close_locked(fd)  # swept between open and lock
        try:
            yield fd, path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)  # not there any more, once it has its name
            close_locked(fd)

    def _rename(self, temporary: str, path: str) -> None:
        try:
            os.rename(temporary, path)
        except FileNotFoundError:  # the first entry of its folder
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if self._fsync:
                _sync_folder(self._entries)
            os.rename(temporary, path)

    def _make_room(self, size: int, full: OSError) -> None:
        """Evicts ``size`` bytes and some for the index. The files go first: then it can change."""
        logger.warning("%s: no room for %d bytes on the disk (%s)", self.path, size, full)
        self._sweep()
        wanted = size + _INDEX_ROOM
        for _ in range(2):
            try:
                self._change(
                    lambda transaction: self._evict(transaction, transaction.totals()[1] - wanted)
                )
                return
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise

    # --- evicting

    def _evict(self, transaction: Transaction, limit: int, keep: str = "") -> tuple[int, int]:
        """Removes what was not used for longest, until ``limit`` bytes are left or all are in use.

        Returns:
            How many entries were removed, and how many bytes are left.
        """
        _, left = transaction.totals()
        if left <= limit:
            return 0, left
        gone: list[str] = []
        evicted = 0
        touched: dict[str, int] = {}  # newer uses than the rows knew
        later: list[tuple[int, str, int]] = []  # a heap of these, to be met again in their turn
        rows = transaction.oldest()
        row = next(rows, None)
        while left > limit and (later or row is not None):
            if row is None or (later and later[0][0] < row.last_used):
                last_used, key, size = heapq.heappop(later)
            else:
                (key, size, last_used), row = row, next(rows, None)
            used = None if key == keep else self._evict_file(key, last_used)
            if used is None:
                continue
            self._clock.observe(used)
            if used > last_used:
                # Met twice at most, whoever keeps touching its file.
                if key not in touched:
                    touched[key] = used
                    heapq.heappush(later, (used, key, size))
                continue
            touched.pop(key, None)
            gone.append(key)
            evicted += used != _NEVER
            left -= size
        # The rows change when the files have made room on the disk for that.
        for key in gone:
            transaction.delete(key)
        for key, used in touched.items():
            transaction.touch(key, used)
        return evicted, left

    def _evict_file(self, key: str, last_used: int) -> int | None:
        """Unlinks a file, if nobody uses it and nobody did after ``last_used``.

        Returns:
            None: it is in use. A time after ``last_used``: its last use. An earlier one: it was
            unlinked; ``_NEVER``: it wasn't there.

        Raises:
            StoreUnavailable: others keep the files' lock. It isn't waited for again for each entry.
        """
        path = self._path(key)
        try:
            fd = open_entry(path)
        except FileNotFoundError:
            return _NEVER
        except EntryError:  # a link, which is removed and not what it leads to
            with alone(self._files_lock, timeout=self._timeout), suppress(OSError):
                if os.path.islink(path):
                    os.unlink(path)
            return last_used
        except OSError:
            return None  # not ours to read, so not ours to remove
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if status.st_mtime_ns <= last_used:
                with alone(self._files_lock, timeout=self._timeout):
                    if not _is_still(path, status):
                        return None  # just put again
                    os.unlink(path)
            return status.st_mtime_ns
        except StoreUnavailable:
            raise
        except OSError:
            return None  # in use, mostly
        finally:
            close_locked(fd)

    # --- what isn't served

    def _not_served(self, key: str, fd: int, error: Exception, *, misses: int = 1) -> None:
        """Counts, logs and, if the file is to blame, sets it aside."""
        reason = getattr(error, "reason", "unreadable")
        bad = isinstance(error, EntryError) and reason != "model"  # which its own store serves
        if bad or getattr(error, "errno", None) == errno.EIO:
            where = self._set_aside(self._path(key), fd, f"{key}.{reason}")
            self._index.try_change(lambda t: self._drop(t, [key]), _DISCARD_PATIENCE)
        else:
            where = "left where it is"
        self._tally.add(failure=reason, misses=misses)
        logger.warning("entry %s is not served, %s; %s", key, error, where)

    def _not_opened(self, key: str, error: EntryError | OSError, *, misses: int = 1) -> None:
        where, reason = "left where it is", "unreadable"
        if isinstance(error, EntryError):  # a symbolic link
            reason = error.reason
            where = self._set_aside(self._path(key), None, f"{key}.{reason}", link=True)
            self._index.try_change(lambda t: self._drop(t, [key]), _DISCARD_PATIENCE)
        self._tally.add(failure=reason, misses=misses)
        logger.warning("entry %s is not served, unreadable: %s; %s", key, error, where)

    def _set_aside(self, path: str | Path, fd: int | None, name: str, *, link: bool = False) -> str:
        """Moves a file to quarantine, if its name is still that of fd, or of a ``link``; says what it
        did."""
        target = self._quarantine / f"{name[:128]}.{secrets.token_hex(4)}{_SUFFIX}"
        try:
            with alone(self._files_lock, timeout=_DISCARD_PATIENCE):
                replaced = fd is not None and not _is_still(path, os.fstat(fd))
                if replaced or (link and not os.path.islink(path)):
                    return "another one has its name by now"
                self._quarantine.mkdir(parents=True, exist_ok=True)
                os.rename(path, target)
        except OSError as error:
            return f"it could not be set aside: {error}"
        self._tally.add(quarantined=1)
        now = self._clock.now()
        with suppress(OSError, NotImplementedError):
            os.utime(target, ns=(now, now), follow_symlinks=False)
        self._trim_quarantine(self.quarantine_bytes)
        if not os.path.lexists(target):
            return "removed: quarantine_bytes is less"
        return f"set aside as {target}"

    def _trim_quarantine(self, limit: int) -> None:
        """Removes what was set aside first, down to ``limit`` bytes."""
        found = []
        for name in _names(self._quarantine):
            path = self._quarantine / name
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

    # --- putting right

    def _sweep(self) -> None:
        """Removes what writers left in ``tmp/`` that died: nobody holds a lock on it."""
        keys = []
        for name in _names(self._tmp):
            path = self._tmp / name
            with suppress(OSError):
                fd = os.open(path, OPEN_FLAGS)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    keys.append(name.partition(".")[0])
                finally:
                    close_locked(fd)
        if keys:  # their rows do no harm where the index isn't to be had now
            self._index.try_change(
                lambda transaction: self._drop(transaction, keys), _DISCARD_PATIENCE
            )

    def _drop_rows_without_files(self, keys: Iterator[str]) -> list[str]:
        """Gives the keys that were dropped; a put about to rename a file looks after its row again."""
        dropped: list[str] = []
        while batch := list(itertools.islice(keys, _VERIFY_BATCH)):
            dropped += self._index.change(lambda t, batch=batch: self._drop(t, batch))
        return dropped

    def _drop(self, transaction: Transaction, keys: list[str]) -> list[str]:
        gone = [
            key
            for key in keys
            if _ENTRY_NAME.fullmatch(key + _SUFFIX)
            and transaction.size(key) is not None
            and not os.path.lexists(self._path(key))
        ]
        for key in gone:
            transaction.delete(key)
        return gone

    def _reconcile(self, keys: list[str]) -> list[str]:
        """Enters files that the index doesn't know, or not with their size; gives their keys."""

        def enter(transaction: Transaction) -> list[str]:
            entered = []
            for key in keys:
                with suppress(FileNotFoundError):
                    status = os.lstat(self._path(key))
                    if transaction.size(key) != status.st_size:
                        transaction.put(key, status.st_size, status.st_mtime_ns)
                        entered.append(key)
            return entered

        return self._index.change(enter) if keys else []


def _names(folder: Path, *, folders: bool = False) -> list[str]:
    """The names in a folder, in order; none where it isn't there.

    Args:
        folders: only those of folders.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(each.name for each in found if not folders or each.is_dir())
    except FileNotFoundError:
        return []


def _write_fully(fd: int, parts: list[memoryview]) -> None:
    parts = list(parts)
    while parts:
        written = os.writev(fd, parts)
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]


def _data_sync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _sync_folder(path: str | Path) -> None:
    """Makes names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: str) -> bool:
    """Whether there was a file to unlink."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _is_still(path: str | Path, status: os.stat_result) -> bool:
    """Whether a name still stands for this file."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False
