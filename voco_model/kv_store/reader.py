"""Reading an entry from its file, whole or a few layers at a time, with its checksum on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import after_fork
from voco_model.kv_store.buffers import BufferPool
from voco_model.kv_store.format import (
    ALIGNMENT,
    Digest,
    EntryError,
    Header,
    assemble,
    entry_over,
    header_size,
    parse_header,
    tensor_over,
)
from voco_model.kv_store.locks import close_locked

# Bytes that are hashed while they are still in the cache that the read brought them into.
CHUNK = 2**20
_MOST_MEMORIES = 1024  # of one preadv: IOV_MAX on Linux
# Without O_NONBLOCK, opening a pipe would wait for its writer. An entry is a file: what a symbolic link
# leads to may be another store's, or change.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
# An evictor locks a file only to unlink it, which takes microseconds.
_LOCK_PATIENCE = 1.0


class EntryReader:
    """One entry of one file. Nobody evicts it while the reader is open.

    In this order::

        with EntryReader(path) as reader:
            header = reader.start(key=key)
            for first_layer, chunk in reader.layers():
                ...  # use chunk, but don't rely on it yet
            entry = reader.finish(kv)  # now the checksum has been compared

    Not for several threads at a time. A child that was forked by the thread that opened it has a lock of
    its own; any other child uses the file without one.

    Attributes:
        fd: the open file.
        header: after ``start``.

    Args:
        path: of a file that doesn't change, but may be replaced or unlinked.
        buffers: where ``layers`` finds memory; None: it allocates it.

    Raises:
        FileNotFoundError: there is none.
        EntryError: a symbolic link.
        OSError: it can't be opened.
    """

    def __init__(self, path: Path | str, buffers: BufferPool | None = None) -> None:
        self.header: Header | None = None
        self._buffers = buffers
        self.fd, self._status = _open_shared(path)
        self._locked = True
        self._thread = threading.get_ident()
        after_fork(self, EntryReader._renew)
        self._next_byte = 0  # of kv
        self._tail_hashed = False

    def _renew(self) -> None:
        """In a forked child: a lock of its own, since parent and child share that of the open file, and
        unlocking it here would end the parent's."""
        if self.fd < 0:
            return
        self._locked = False
        if self._thread != threading.get_ident():
            return  # of a thread that this process doesn't have
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", OPEN_FLAGS & ~os.O_NOFOLLOW)
        except OSError:
            return  # no such folder on this system
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)  # being evicted
            return
        os.close(self.fd)
        self.fd, self._locked = fd, True

    def start(self, *, key: str | None = None, fingerprint: str | None = None) -> Header:
        """Reads all but ``kv``, and checks everything but the checksum.

        Args:
            key, fingerprint: what the entry must be of; None: any.

        Raises:
            EntryError: it isn't that entry. See ``EntryError.reason``.
            OSError: the disk failed.
        """
        if not stat.S_ISREG(self._status.st_mode):
            raise EntryError("foreign", f"expected a file, got mode {self._status.st_mode:o}")
        start = os.pread(self.fd, ALIGNMENT, 0)
        size = header_size(start)
        if size > len(start):
            start += os.pread(self.fd, size - len(start), len(start))
        header = parse_header(start, self._status.st_size)
        header.check(key, fingerprint)
        self._digest = Digest(start[:size])
        self._tail = memoryview(bytearray(header.file_size - header.tail))
        _read_fully(self.fd, self._tail, header.tail)
        self.header = header
        return header

    def read(self, first_layer: int, count: int, into: memoryview) -> Tensor:
        """Reads layers into memory, and adds them to the checksum: so each once, in order.

        Args:
            first_layer: where the last read stopped.
            count: how many layers.
            into: writable, at least ``count * header.layer_nbytes`` bytes; fast if it is 32-byte
                aligned and was written before.

        Returns:
            ``[count, 2, Hkv, n, D]``, a view of ``into`` (a copy only if that isn't aligned for the
            dtype).

        Raises:
            ValueError: layers out of order, or too little memory.
            EntryError: the file was cut off meanwhile.
            OSError: the disk failed.
        """
        header = self.header
        size = count * header.layer_nbytes
        if len(into) < size:
            raise ValueError(f"expected memory of {size} bytes or more, got {len(into)}")
        self.read_bytes(first_layer * header.layer_nbytes, into[:size])
        # Of `into` itself, whose life may stand for that of its memory (BufferPool).
        tensor = tensor_over(into, header.dtype, size // header.dtype.itemsize)
        return tensor.view(count, *header.shape[1:])

    def read_bytes(self, at: int, into: memoryview) -> None:
        """As ``read``, but any number of bytes of ``kv``, from ``at``, where the last read stopped."""
        kv_nbytes = self.header.tail - self.header.size
        if at != self._next_byte or not 0 < len(into) <= kv_nbytes - at:
            raise ValueError(
                f"expected bytes from {self._next_byte} up to {kv_nbytes}, got {len(into)} from {at}; "
                "a checksum needs each once, in order"
            )
        for start in range(0, len(into), CHUNK):
            chunk = into[start : start + CHUNK]
            _read_fully(self.fd, chunk, self.header.size + at + start)
            self._digest.update(chunk)
        self._next_byte += len(into)

    def read_scattered(self, into: Sequence[memoryview]) -> None:
        """As ``read_bytes``, all of ``kv``, one memory after another."""
        at, first, last = 0, 0, len(into)
        if self._next_byte or sum(map(len, into)) != self.header.tail - self.header.size:
            raise ValueError("expected memory for all of kv, before any other read")
        while first < last:
            stop, size = first, 0
            while stop < last and stop - first < _MOST_MEMORIES and (not size or size < CHUNK):
                size += len(into[stop])
                stop += 1
            chunk = into[first:stop]
            if os.preadv(self.fd, chunk, self.header.size + at) < size:
                # Seldom: again, in parts, of which each is read until it is full.
                where = self.header.size + at
                for memory in chunk:
                    _read_fully(self.fd, memory, where)
                    where += len(memory)
            for memory in chunk:
                self._digest.update(memory)
            at, first = at + size, stop
        self._next_byte = at

    def layers(
        self, into: memoryview | None = None, *, chunk_nbytes: int = 2 * CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        """All layers in order, and at the end the checksum.

        Args:
            into: as large as ``kv``, and filled from its beginning; or None, and then a chunk is
                overwritten by the next one.
            chunk_nbytes: how much to read at a time; at least one layer.

        Yields:
            The index of the first layer, and ``[layers, 2, Hkv, n, D]``.

        Raises:
            EntryError: after the last chunk, if anything that came before wasn't as it was written.
        """
        nbytes, total = self.header.layer_nbytes, self.header.shape[0]
        count = min(max(1, chunk_nbytes // nbytes), total)
        own = self._memory(count * nbytes) if into is None else None
        for first in range(self._next_byte // nbytes, total, count):
            here = min(count, total - first)
            target = own if into is None else into[first * nbytes : (first + here) * nbytes]
            yield first, self.read(first, here, target)
        self.check()

    def outline(self) -> tuple[CompactKV, Tensor | None]:
        """The entry as ``start`` knows it, with its tensors on the meta device; and its real scales. Not
        to be relied on before ``check``."""
        header = self.header
        kv = torch.empty(header.shape, dtype=header.dtype, device="meta")
        shell = assemble(header, kv, self._tail, 0)
        if shell.scales is None:
            return shell, None
        scales = tensor_over(self._tail, torch.float32, shell.scales.numel())
        return shell, scales.view(shell.scales.shape)

    def check(self) -> None:
        """Compares the checksum, once all layers are read.

        Raises:
            EntryError: something isn't as it was written.
        """
        kv_nbytes = self.header.tail - self.header.size
        if self._next_byte != kv_nbytes:
            raise ValueError(
                f"expected all {kv_nbytes} bytes of kv read before the checksum is compared, got "
                f"{self._next_byte}"
            )
        if not self._tail_hashed:
            self._digest.update(self._tail)
            self._tail_hashed = True
        self._digest.check(self.header)

    def finish(self, kv: Tensor) -> CompactKV:
        """The entry, after ``check``; with ``kv`` ``[L, 2, Hkv, n, D]`` wherever it was read to."""
        self.check()
        return assemble(self.header, kv, self._tail)

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            if self._locked:
                close_locked(fd)
            else:
                os.close(fd)

    def __enter__(self) -> EntryReader:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _memory(self, size: int) -> memoryview:
        return memoryview(bytearray(size)) if self._buffers is None else self._buffers.lease(size)


def read_entry(
    fd: int, buffers: BufferPool, key: str, fingerprint: str | None
) -> tuple[CompactKV, int]:
    """An entry as a whole, by as few calls as it takes: for one of 0.5 MB they cost as much as the copy.

    Returns:
        The entry, and how many bytes its file has.

    Raises:
        EntryError: it isn't an intact entry of this key and model.
        OSError, MemoryError: the disk or the memory failed.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise EntryError("foreign", f"expected a file, got mode {status.st_mode:o}")
    size = status.st_size
    memory = buffers.lease(max(size, 1))
    chunk = memory[: CHUNK if size > CHUNK else size]
    _read_fully(fd, chunk, 0)
    header = parse_header(chunk, size)
    header.check(key, fingerprint)
    digest = Digest(chunk[: header.size])
    digest.update(chunk[header.size :])
    for start in range(CHUNK, size, CHUNK):
        chunk = memory[start : start + CHUNK]
        _read_fully(fd, chunk, start)
        digest.update(chunk)
    digest.check(header)
    return entry_over(memory, header), size


def mark_used(fd: int, now: int) -> None:
    """Makes a file the last that eviction would take: by its mtime, in nanoseconds of a ``UseClock``."""
    try:
        os.utime(fd, ns=(now, now))
    except OSError:
        pass  # another user's file, or a disk that is read-only


def open_entry(path: Path | str) -> int:
    """Opens a file of an entry.

    Raises:
        EntryError: a symbolic link.
        OSError: it can't be opened.
    """
    try:
        return os.open(path, OPEN_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise EntryError("foreign", "expected a file, got a symbolic link") from error
        raise


def _read_fully(fd: int, into: memoryview, at: int) -> None:
    got = os.preadv(fd, [into], at)
    while got < len(into):
        more = os.preadv(fd, [into[got:]], at + got)
        if not more:
            raise EntryError("truncated", f"expected {len(into)} bytes at {at}, got {got}")
        got += more


def _open_shared(path: Path | str) -> tuple[int, os.stat_result]:
    """An open file with a lock that keeps eviction away."""
    deadline = None
    while True:
        fd = open_entry(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if status.st_nlink:
                return fd, status
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        # Unlinked between open and lock, or about to be. Perhaps another one has its name by now.
        close_locked(fd)
        if deadline is None:
            deadline = time.monotonic() + _LOCK_PATIENCE
        elif time.monotonic() > deadline:
            raise BlockingIOError(
                f"expected a shared lock on {path}, got none in {_LOCK_PATIENCE} s"
            )
        time.sleep(0.0001)
