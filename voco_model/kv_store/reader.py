"""``EntryReader``: reads an entry from its file, a few layers at a time, and verifies its checksum."""

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

# Bytes to read at a time, so that they are still in the CPU's cache when they are hashed.
CHUNK = 2**20
_MOST_MEMORIES = 1024  # for one preadv: IOV_MAX on Linux
# Without O_NONBLOCK, opening a pipe would wait for its writer. O_NOFOLLOW, because the target of a
# symbolic link may belong to another store, or change.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
# Eviction locks a file only while it unlinks it, which takes microseconds.
_LOCK_PATIENCE = 1.0


class EntryReader:
    """Reads one entry from its file, which is not evicted while the reader is open.

    Use it in this order::

        with EntryReader(path) as reader:
            header = reader.start(key=key)
            for first_layer, chunk in reader.layers():
                ...  # use chunk, but don't rely on it yet
            entry = reader.finish(kv)  # the checksum is verified now

    Not thread-safe. A child forked by the thread that opened the reader gets a lock of its own; any
    other child uses the file without one.

    Args:
        path: of a file that doesn't change, but may be replaced or unlinked.
        buffers: memory for ``layers``; None allocates it.

    Attributes:
        fd: the open file.
        header: set by ``start``.

    Raises:
        FileNotFoundError: there is no such file.
        EntryError: it is a symbolic link.
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
        """In a forked child: gets a lock of its own. Parent and child share the lock of the open file,
        so unlocking that here would end the parent's as well."""
        if self.fd < 0:
            return
        self._locked = False
        if self._thread != threading.get_ident():
            return  # the thread that uses it doesn't exist in this process
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", OPEN_FLAGS & ~os.O_NOFOLLOW)
        except OSError:
            return  # a system without /proc
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)  # being evicted
            return
        os.close(self.fd)
        self.fd, self._locked = fd, True

    def start(self, *, key: str | None = None, fingerprint: str | None = None) -> Header:
        """Reads everything but ``kv``, and checks everything but the checksum.

        Args:
            key, fingerprint: that the entry must have; None accepts any.

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
        """Reads layers and adds them to the checksum. Each layer must be read once, in order.

        Args:
            first_layer: where the last read ended.
            count: number of layers.
            into: writable memory of at least ``count * header.layer_nbytes`` bytes; fast if it is
                32-byte aligned and was written before.

        Returns:
            ``[count, 2, Hkv, n, D]``, a view of ``into`` (a copy if that isn't aligned for the dtype).

        Raises:
            ValueError: layers out of order, or too little memory.
            EntryError: the file was truncated meanwhile.
            OSError: the disk failed.
        """
        header = self.header
        size = count * header.layer_nbytes
        if len(into) < size:
            raise ValueError(
                f"expected memory of at least {size} bytes, got {len(into)}; read fewer layers"
            )
        self.read_bytes(first_layer * header.layer_nbytes, into[:size])
        # A view of `into` itself and not of a slice, because BufferPool reuses its memory with its end.
        tensor = tensor_over(into, header.dtype, size // header.dtype.itemsize)
        return tensor.view(count, *header.shape[1:])

    def read_bytes(self, at: int, into: memoryview) -> None:
        """As ``read``, but for any number of bytes of ``kv``, from ``at``, where the last read ended."""
        kv_nbytes = self.header.tail - self.header.size
        if at != self._next_byte or not 0 < len(into) <= kv_nbytes - at:
            raise ValueError(
                f"expected bytes from {self._next_byte} up to {kv_nbytes}, got {len(into)} from {at}; "
                "read each byte once, in order, for the checksum"
            )
        for start in range(0, len(into), CHUNK):
            chunk = into[start : start + CHUNK]
            _read_fully(self.fd, chunk, self.header.size + at + start)
            self._digest.update(chunk)
        self._next_byte += len(into)

    def read_scattered(self, into: Sequence[memoryview]) -> None:
        """As ``read_bytes``, for all of ``kv`` at once, into several memories one after another."""
        at, first, last = 0, 0, len(into)
        if self._next_byte or sum(map(len, into)) != self.header.tail - self.header.size:
            raise ValueError(
                "expected memory for all of kv, before any other read, got another size or a later call"
            )
        while first < last:
            stop, size = first, 0
            while stop < last and stop - first < _MOST_MEMORIES and (not size or size < CHUNK):
                size += len(into[stop])
                stop += 1
            chunk = into[first:stop]
            if os.preadv(self.fd, chunk, self.header.size + at) < size:
                # A short read, which is rare: read again, each memory until it is full.
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
        """Reads all layers in order, and then verifies the checksum.

        Args:
            into: memory as large as ``kv``; if None, each chunk overwrites the one before.
            chunk_nbytes: bytes to read at a time; at least one layer is.

        Yields:
            The index of the first layer, and ``[layers, 2, Hkv, n, D]``.

        Raises:
            EntryError: after the last chunk, if anything in the file is not as it was written.
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
        """The entry after ``start``, with its tensors on the meta device, and its actual scales. Not
        reliable before ``check``."""
        header = self.header
        kv = torch.empty(header.shape, dtype=header.dtype, device="meta")
        shell = assemble(header, kv, self._tail, 0)
        if shell.scales is None:
            return shell, None
        scales = tensor_over(self._tail, torch.float32, shell.scales.numel())
        return shell, scales.view(shell.scales.shape)

    def check(self) -> None:
        """Verifies the checksum, once all layers have been read.

        Raises:
            ValueError: some haven't.
            EntryError: something in the file is not as it was written.
        """
        kv_nbytes = self.header.tail - self.header.size
        if self._next_byte != kv_nbytes:
            raise ValueError(
                f"expected all {kv_nbytes} bytes of kv to be read before the checksum is verified, got "
                f"{self._next_byte}; read the others first"
            )
        if not self._tail_hashed:
            self._digest.update(self._tail)
            self._tail_hashed = True
        self._digest.check(self.header)

    def finish(self, kv: Tensor) -> CompactKV:
        """The entry, after ``check``. ``kv`` ``[L, 2, Hkv, n, D]`` is what was read, on any device."""
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
    """Reads a whole entry with few system calls: for 0.5 MB, calls can take as long as the copy.

    Returns:
        The entry, and the bytes of its file.

    Raises:
        EntryError: not an intact entry with this key and fingerprint.
        OSError, MemoryError: the disk failed, or there is no memory.
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
    """Marks a file as used at ``now``, in nanoseconds of a ``UseClock``, by its modification time."""
    try:
        os.utime(fd, ns=(now, now))
    except OSError:
        pass  # another user's file, or a read-only disk


def open_entry(path: Path | str) -> int:
    """Opens an entry's file for reading.

    Raises:
        EntryError: it is a symbolic link.
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
    """Opens a file and locks it (shared), which keeps eviction away."""
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
        # Unlinked between open and lock, or about to be. Another file may have its name by now.
        close_locked(fd)
        if deadline is None:
            deadline = time.monotonic() + _LOCK_PATIENCE
        elif time.monotonic() > deadline:
            raise BlockingIOError(f"no shared lock on {path} within {_LOCK_PATIENCE} s")
        time.sleep(0.0001)
