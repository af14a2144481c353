"""``KVStore``: entries in a folder of a local disk, shared by any number of processes.

The folder::

    v1/ab/<key>.safetensors   entries in version 1 of the format, in 256 folders by key
    tmp/                      entries being written, each locked by its writer
    quarantine/               files that were not intact entries; the oldest are removed first
    index.sqlite              sizes and last uses (index.py)
    index.lock, files.lock    held while the index is built, and while a file is renamed or unlinked
    clock                     its modification time is the latest use so far (use_clock.py)

Everything but the entries is created again if it is removed, even while the store is open. A symbolic
link in place of an entry is never followed.

A read looks at the path and not at the index, and needs no lock: files never change (files.py). Writes
(writing.py) keep the index's rows in agreement with the files (rows.py) and evict (eviction.py). No lock
is waited for longer than ``index_timeout``, since a process may be stopped while it holds one.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    VerifyReport,
    key_of,
    logger,
    rows_of_keys,
)
from voco_model.kv_store.buffers import BufferPool
from voco_model.kv_store.files import Files, unlink
from voco_model.kv_store.format import EntryError, Header, encode
from voco_model.kv_store.index import Index, Transaction
from voco_model.kv_store.loading import STREAMED_FROM, load_from_files
from voco_model.kv_store.quarantine import Quarantine
from voco_model.kv_store.reader import (
    OPEN_FLAGS,
    EntryReader,
    mark_used,
    open_entry,
    read_entry,
)
from voco_model.kv_store.rows import BATCH, Rows
from voco_model.kv_store.sizes import byte_count
from voco_model.kv_store.use_clock import UseClock
from voco_model.kv_store.writing import Writer


@dataclass
class DiskStats(StoreStats):
    """``StoreStats`` of a ``KVStore``.

    Attributes:
        evictions: entries removed to make room.
        quarantined: files set aside because they were not intact entries.
        overfull: puts that left more than ``max_bytes`` in the store because all else was in use.
        index_rebuilds: how often the index was built from the files.
        unpooled: reads for which the buffer pool had no room.
    """

    evictions: int = 0
    quarantined: int = 0
    overfull: int = 0
    index_rebuilds: int = 0
    unpooled: int = 0


class KVStore(Store):
    """Compact entries in a folder of limited size, evicted least recently used first.

    Any number of processes and threads may use a folder at the same time, through a ``KVStore`` of their
    own or one opened before a fork. It must be on a local file system that supports ``flock``.

    Args:
        path: the folder, created if it doesn't exist.
        max_bytes: total size of the entries' files, as an int or text such as "20GB". All processes
            should pass the same. Entries being written, the index (about 300 bytes an entry) and
            ``quarantine_bytes`` come on top.
        fingerprint: of the model whose entries are stored and served; None accepts any.
        fsync: whether an entry survives a power failure once ``put`` has returned. It survives a crash
            of the process either way.
        quarantine_bytes: total size of the files set aside; by default ``max_bytes // 16``.
        buffers: memory to read into; by default the store's own, up to 256 MiB.
        index_timeout: seconds that ``put`` and ``delete`` wait for each lock held by others.

    Raises:
        TypeError, ValueError: invalid sizes.
        OSError: the folder can't be created or written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        max_bytes: int | str,
        fingerprint: str | None = None,
        fsync: bool = True,
        quarantine_bytes: int | str | None = None,
        buffers: BufferPool | None = None,
        index_timeout: float = 30.0,
    ) -> None:
        self.max_bytes = byte_count("max_bytes", max_bytes, at_least=1)
        if quarantine_bytes is None:
            quarantine_bytes = self.max_bytes // 16
        quarantine_bytes = byte_count("quarantine_bytes", quarantine_bytes, at_least=0)
        self.path = Path(path).absolute()
        self.fingerprint = fingerprint
        self.buffers = BufferPool() if buffers is None else buffers
        self._closed = False
        self._tally = Tally(DiskStats())
        self._files = Files(self.path, timeout=index_timeout, sync=fsync)
        self._clock = UseClock(self.path / "clock")
        self._index = Index(
            self.path / "index.sqlite", self._files.rows, timeout=index_timeout, sync=fsync
        )
        self._rows = Rows(self._index, self._files)
        self._writer = Writer(self._files, self._index, self._rows, self._clock, self._tally)
        self._quarantine = Quarantine(
            self._files, self._rows, self._clock, self._tally, max_bytes=quarantine_bytes
        )
        with suppress(StoreUnavailable):  # which the index has logged already
            self._clock.observe(self._index.newest())
        self._writer.sweep()

    @staticmethod
    def open(url: str, **options) -> Store:
        """Deprecated name of ``voco_model.open_store``."""
        import voco_model

        warnings.warn(
            "KVStore.open(url) will be removed in the next release; call voco_model.open_store(url)",
            DeprecationWarning,
            stacklevel=2,
        )
        return voco_model.open_store(url, **options)

    def __repr__(self) -> str:
        return f"KVStore({str(self.path)!r}, max_bytes={self.max_bytes})"

    # --- reading

    def get(self, key: str) -> CompactKV | None:
        self._check_open()
        path = self._files.path(key)
        try:
            fd = open_entry(path)
        except FileNotFoundError:
            self._tally.add(misses=1)
            return None
        except (EntryError, OSError) as error:
            self._quarantine.refuse(key, error)
            return None
        try:
            # No lock: eviction would only unlink the file, which stays readable. Marking it first makes
            # that unlikely.
            mark_used(fd, self._clock.now())
            entry, size = read_entry(fd, self.buffers, key, self.fingerprint)
        except (EntryError, OSError, MemoryError) as error:
            self._quarantine.refuse(key, error, fd)
            return None
        finally:
            os.close(fd)
        self._tally.add(hits=1, bytes_read=size)
        return entry

    @contextmanager
    def reader(self, key: str) -> Iterator[EntryReader | None]:
        """Context in which an entry is read a few layers at a time, straight to where it is needed.

        Its value is a started ``EntryReader``, or None for a miss. An error that the reader raises
        within the context is handled as in ``get`` and then raised: the layers read so far must not be
        used.

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
                self._quarantine.refuse(key, error, reader.fd)
                raise
            except OSError as error:
                # Others may be the caller's own errors; this one is the disk's.
                if error.errno == errno.EIO:
                    self._quarantine.refuse(key, error, reader.fd)
                raise
            mark_used(reader.fd, self._clock.now())
        self._tally.add(hits=1, bytes_read=reader.header.file_size)

    def _opened(self, key: str) -> EntryReader | None:
        """A started reader; None for a miss, which is counted and logged."""
        try:
            reader = EntryReader(self._files.path(key), self.buffers)
        except FileNotFoundError:
            self._tally.add(misses=1)
            return None
        except (EntryError, OSError) as error:
            self._quarantine.refuse(key, error)
            return None
        try:
            reader.start(key=key, fingerprint=self.fingerprint)
        except (EntryError, OSError) as error:
            self._quarantine.refuse(key, error, reader.fd)
            reader.close()
            return None
        return reader

    def outline(self, key: str) -> tuple[CompactKV, Header] | None:
        """An entry with ``kv`` on the meta device, and its header; None for a miss.

        It doesn't count as a use, and its checksum is not verified: read the file to its end first.
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
        """As ``Store.load_into``. Large entries are read, checked and placed a piece at a time, without
        a copy of the whole entry."""
        rows = rows_of_keys(keys)
        if max((self._files.size(key) for row in rows for key in row), default=0) < STREAMED_FROM:
            return super().load_into(cache, rows, **placement)
        return load_from_files(
            cache,
            rows,
            placement,
            outline=self.outline,
            reader=self.reader,
            buffers=self.buffers,
        )

    def prefetch(self, keys: Iterable[str]) -> None:
        """Asks the kernel to read these files into its page cache in the background."""
        for path in map(self._files.path, keys):
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
            reader = EntryReader(self._files.path(key))
        except (EntryError, OSError):
            yield False
            return
        with reader:
            yield True

    # --- writing

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """As ``Store.put``. It returns once the entry is on the disk, under its name.

        If the disk is full (bytes, inodes or a quota), enough entries are evicted for this one, and it
        is tried once more; likewise if a folder was removed.

        Raises:
            ValueError: also for an entry larger than ``max_bytes``.
            OSError: also for a disk that stays full; StoreUnavailable if a lock isn't free within
                ``index_timeout``.
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
        try:
            self._writer.write(key, parts, size, self.max_bytes)
        except OSError:
            self._tally.add(put_failures=1)
            raise
        self._tally.add(puts=1, bytes_written=size)

    def delete(self, key: str) -> bool:
        self._check_open()
        path = self._files.path(key)

        def delete(transaction: Transaction) -> bool:
            existed = unlink(path)
            transaction.delete(key)
            return existed

        existed = self._index.change(delete)
        self._tally.add(deletes=int(existed))
        return existed

    def clear(self) -> None:
        """Deletes every entry, and everything in quarantine."""
        self._check_open()

        def clear(transaction: Transaction) -> int:
            count = 0
            for row in transaction.oldest():
                count += unlink(self._files.path(row.key))
                transaction.delete(row.key)
            return count

        self._tally.add(deletes=self._index.change(clear))
        self._quarantine.trim(0)

    # --- contents

    @property
    def quarantine_bytes(self) -> int:
        """Limit on the total size of the files set aside."""
        return self._quarantine.max_bytes

    def __contains__(self, key: object) -> bool:
        return self._files.exists(key)

    def header(self, key: str) -> Header:
        """An entry's header. The checksum is not verified, and this doesn't count as a use.

        Raises:
            FileNotFoundError: there is no such entry.
            EntryError: the file isn't an entry of that key.
        """
        with EntryReader(self._files.path(key)) as reader:
            return reader.start(key=key)

    def last_used(self, key: str) -> int:
        """When an entry was last put or served, in nanoseconds since the epoch.

        Raises:
            FileNotFoundError: there is no such entry.
        """
        return os.stat(self._files.path(key)).st_mtime_ns

    def __iter__(self) -> Iterator[str]:
        self._check_open()
        return self._index.keys()

    def __len__(self) -> int:
        self._check_open()
        return self._index.totals()[0]

    def stats(self) -> DiskStats:
        """Counters of this handle; entries and bytes as the index has them now."""
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
        """Reads every byte of the store, sets bad files aside and repairs the index.

        Other processes may go on using the store. Uses are not marked, and nothing is evicted.

        Raises:
            OSError: the index can't be written, or the folder can't be listed.
        """
        self._check_open()
        report = VerifyReport()
        self._writer.sweep()
        self._index.check()
        intact: list[str] = []
        for path, key in self._files.listed():
            if key is None:
                report.bad[path.name] = "foreign"
                fate = self._quarantine.set_aside(path, path.name)
                logger.warning("%s is not named like an entry; %s", path, fate)
            elif self._verify_entry(key, report):
                intact.append(key)
                if len(intact) == BATCH:
                    report.added += self._rows.add(intact)
                    intact.clear()
        report.added += self._rows.add(intact)
        report.dropped = self._rows.drop_missing()
        return report

    def _verify_entry(self, key: str, report: VerifyReport) -> bool:
        """Reads an entry, and reports it; whether it is intact."""
        try:
            with EntryReader(self._files.path(key), self.buffers) as reader:
                try:
                    size = reader.start(key=key).file_size
                    for _ in reader.layers():
                        pass
                except (EntryError, OSError) as error:
                    report.bad[key] = self._quarantine.refuse(key, error, reader.fd, misses=0)
                    return False
        except FileNotFoundError:  # evicted meanwhile
            return False
        except (EntryError, OSError) as error:
            report.bad[key] = self._quarantine.refuse(key, error, misses=0)
            return False
        report.entries += 1
        report.bytes += size
        return True

    def close(self) -> None:
        self._closed = True
        self._index.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"expected an open store, got {self} after close(); open it again")
