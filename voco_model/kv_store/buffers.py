"""Memory to read entries into, used again when nobody looks at it any more.

What makes a read fast is memory that was written before: the first touch of a page costs the kernel more
than the copy into it (and pinning it costs 100 times that). It is aligned to a page, because a read to
an address of 16 modulo 32, as malloc gives them, takes three times as long.
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
    """Page-aligned host memory, pinned where there is CUDA.

    ``lease`` gives a memoryview; when it is gone, and every tensor made over it by ``torch.frombuffer``
    with it, its memory is given to a later lease. Only these count: a slice of the memoryview, or a
    memoryview of it, doesn't keep its memory from being given away.

    A copy to a GPU that was started from such a tensor may still be reading when the tensor is gone.
    Who starts one keeps the tensor until the copy is done (an event says when).

    A forked child begins with a pool of its own, and without pinned memory: CUDA doesn't survive a fork.

    Args:
        limit: bytes that the pool keeps, in use and free together. A lease that doesn't fit gets memory
            of its own, which is given back to the system after use; ``unpooled`` counts these.
        pin: whether to pin; None: where CUDA is available.
    """

    def __init__(self, limit: int = 256 * 2**20, *, pin: bool | None = None) -> None:
        if limit < 0:
            raise ValueError(f"expected a limit of 0 bytes or more, got {limit}")
        self.limit = limit
        self._pin = pin
        self._begin()
        after_fork(self, BufferPool._begin_in_child)

    def _begin(self) -> None:
        self.unpooled = 0
        self._lock = threading.Lock()
        self._held = 0  # bytes, leased and free
        self._free: dict[int, deque[memoryview]] = {}  # by size
        self._leases: dict[int, _Lease] = {}  # by id; keeps them alive, or they'd never be called

    def _begin_in_child(self) -> None:
        # Leases of the parent's find their own absence here, and their memory is simply let go.
        self._begin()
        self._pin = False

    def lease(self, size: int) -> memoryview:
        """``size`` bytes, at least 1, of any content.

        Raises:
            OSError, MemoryError: the system has none.
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
        """Bytes that the pool keeps, in use and free together."""
        return self._held

    def _block(self, size: int) -> memoryview | None:
        """Free memory of this size, or new memory if the limit allows it."""
        free = self._free.get(size)
        try:
            return free.pop()  # the warmest; without a lock, which returns must never wait for
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
        """Gives a free block back to the system, if there is one."""
        for size in sorted(self._free, reverse=True):
            try:
                self._free[size].popleft()
            except IndexError:
                continue
            self._held -= size
            return True
        return False

    def _return(self, lease: _Lease) -> None:
        # The garbage collector may call this at any moment in any thread, also in one that holds our
        # lock: nothing here waits. pop and append are atomic.
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
                logger.warning("reading into pageable memory, which is slower: %s", error)
        # Private, or a forked child would write into its parent's entries.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without them
        return memoryview(memory)


class _Lease(weakref.ref):
    """Tells the pool when a memoryview is gone; remembers what memory it was of."""

    __slots__ = ("block",)

    block: memoryview


def _rounded(size: int) -> int:
    """The size class: eight of them between powers of two, so that at most a ninth is wasted."""
    if size <= _SMALLEST:
        return _SMALLEST
    step = 1 << ((size - 1).bit_length() - 4)
    return -(-size // step) * step
