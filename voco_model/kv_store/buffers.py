"""``BufferPool``: memory to read entries into, reused once unreferenced.

Reads are fast into memory that was written before: the first touch of a page costs the kernel more than
the copy into it (and pinning it costs 100 times as much). Buffers are page-aligned, because a read to an
address of 16 modulo 32, which malloc returns, takes three times as long.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections import deque

import torch

from voco_model.kv_store.base import after_fork

logger = logging.getLogger("voco_model.kv_store")

_SMALLEST = 64 * 1024
_HUGE_PAGE = 2 * 1024 * 1024


class BufferPool:
    """Page-aligned host memory, pinned if CUDA is available.

    ``lease`` returns a memoryview. Its memory is reused once it has been garbage-collected, along with
    every tensor made from it by ``torch.frombuffer``. Only these references count: a slice of the
    memoryview, or a memoryview of it, doesn't keep the memory from being reused.

    An asynchronous copy from such a tensor to a GPU doesn't keep the memory either: keep the tensor
    until the copy is done, which an event tells.

    A forked child starts with an empty pool without pinned memory: CUDA doesn't survive a fork.

    Args:
        limit: bytes that the pool keeps, used and free together. A lease that doesn't fit gets memory of
            its own, which is returned to the system after use; ``unpooled`` counts these.
        pin: whether to pin the memory; None pins it if CUDA is available.
    """

    def __init__(self, limit: int = 256 * 2**20, *, pin: bool | None = None) -> None:
        if limit < 0:
            raise ValueError(f"expected limit >= 0 bytes, got {limit}")
        self.limit = limit
        self._pin = pin
        self._begin()
        after_fork(self, BufferPool._begin_in_child)

    def _begin(self) -> None:
        self.unpooled = 0
        self._lock = threading.Lock()
        self._held = 0  # bytes, leased and free
        self._free: dict[int, deque[memoryview]] = {}  # by size
        self._leases: dict[int, _Lease] = {}  # by id; a weak reference must live to be called

    def _begin_in_child(self) -> None:
        # The parent's leases are no longer registered, so their memory is simply freed.
        self._begin()
        self._pin = False

    def lease(self, size: int) -> memoryview:
        """``size`` bytes (at least 1) with undefined contents.

        Raises:
            OSError, MemoryError: the system is out of memory.
        """
        block = self._block(_rounded(size))
        if block is None:
            self.unpooled += 1
            return self._allocate(size)[:size]
        view = block[:size]
        lease = _Lease(view, self._return)
        lease.block = block
        self._leases[id(lease)] = lease
        return view

    @property
    def held(self) -> int:
        """Bytes that the pool keeps, used and free together."""
        return self._held

    def _block(self, size: int) -> memoryview | None:
        """A free block of this size, or a new one if the limit allows it; otherwise None."""
        free = self._free.get(size)
        try:
            return free.pop()  # the most recently used; without the lock: see _return
        except (AttributeError, IndexError):
            pass
        with self._lock:
            while self._held + size > self.limit and self._drop_one():
                pass
            if self._held + size > self.limit:
                return None
            self._free.setdefault(size, deque())
            self._held += size
        try:
            return self._allocate(size)
        except BaseException:
            with self._lock:
                self._held -= size
            raise

    def _drop_one(self) -> bool:
        """Returns a free block to the system. False if there is none."""
        for size in sorted(self._free, reverse=True):
            try:
                self._free[size].popleft()
            except IndexError:
                continue
            self._held -= size
            return True
        return False

    def _return(self, lease: _Lease) -> None:
        # The garbage collector may call this at any time in any thread, even in one that holds the lock,
        # so this takes no lock. pop and append are atomic.
        if self._leases.pop(id(lease), None) is not None:
            self._free[len(lease.block)].append(lease.block)

    def _allocate(self, size: int) -> memoryview:
        if self._pin is None:
            self._pin = torch.cuda.is_available()
        if self._pin:
            try:
                pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                return memoryview(pinned.numpy())
            except RuntimeError as error:
                self._pin = False
                logger.warning(
                    "pinning failed; reading into pageable memory, which is slower: %s", error
                )
        # Private, so that a forked child can't write into its parent's entries.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages
        return memoryview(memory)


class _Lease(weakref.ref):
    """Notifies the pool when a memoryview is garbage-collected, and remembers its block."""

    __slots__ = ("block",)

    block: memoryview


def _rounded(size: int) -> int:
    """The size class: eight between powers of two, so that at most a ninth is wasted."""
    if size <= _SMALLEST:
        return _SMALLEST
    step = 1 << ((size - 1).bit_length() - 4)
    return -(-size // step) * step
