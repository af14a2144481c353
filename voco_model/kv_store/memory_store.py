"""``MemoryStore``: the most recently used entries, in host memory that a GPU reads directly."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    Tally,
    VerifyReport,
    after_fork,
    key_of,
    logger,
)
from voco_model.kv_store.format import check_key
from voco_model.kv_store.sizes import byte_count


class MemoryStore(Store):
    """Entries in the memory of this process, evicted least recently used first.

    ``put`` copies, so later changes to the caller's tensors don't affect the store. ``get`` returns the
    store's own tensors, the same to every caller: don't write to them. They stay valid when their entry
    is evicted, replaced or deleted. An entry that was modified in place since it was put is not served
    but dropped, with the reason "overwritten".

    Args:
        max_bytes: total size of the entries, 0 or more, as an int or text such as "2GB".
        fingerprint: of the model whose entries are stored; None accepts any.
        pin: whether to pin the memory; None pins it if CUDA is available.

    Raises:
        TypeError, ValueError: an invalid max_bytes; ``pin`` without CUDA.
    """

    durable = False

    def __init__(
        self, max_bytes: int | str, *, fingerprint: str | None = None, pin: bool | None = None
    ) -> None:
        if pin and not torch.cuda.is_available():
            raise ValueError("expected CUDA for pin=True, got none; leave pin out")
        self._max_bytes = byte_count("max_bytes", max_bytes, at_least=0)
        self.fingerprint = fingerprint
        self._pin = torch.cuda.is_available() if pin is None else pin
        # By key, the most recently used last: the entry, its size, the versions of its tensors.
        self._entries: OrderedDict[str, tuple[CompactKV, int, list[int]]] = OrderedDict()
        self._bytes = 0
        self._tally = Tally(StoreStats())
        self._lock = threading.Lock()
        after_fork(self, MemoryStore._begin_in_child)

    def _begin_in_child(self) -> None:
        self._lock = threading.Lock()
        # Another thread of the parent may have changed the entries but not yet the sum.
        self._bytes = sum(size for _, size, _ in self._entries.values())
        self._pin = False  # CUDA doesn't survive a fork

    def __repr__(self) -> str:
        return f"MemoryStore({self._bytes} of {self._max_bytes} B{', pinned' if self._pin else ''})"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """As ``Store.put``; also raises ValueError for an entry larger than ``max_bytes``, and OSError
        if the system has no memory."""
        key = key_of(entry, key, self.fingerprint)
        size = sum(tensor.nbytes for tensor in _tensors(entry))
        if size > self._max_bytes:
            self._tally.add(put_failures=1)
            raise ValueError(
                f"expected an entry of up to max_bytes = {self._max_bytes} bytes, got {size}; open the "
                "store with more, or quantize the entry"
            )
        # Make room before copying: max_bytes limits the copy as well.
        with self._lock:
            self._drop(key)
            self._evict(self._max_bytes - size)
        try:
            copy = self._copy(entry, key)
        except (MemoryError, RuntimeError) as error:  # torch's, for allocating or pinning
            self._tally.add(put_failures=1)
            raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: {error}") from error
        with self._lock:
            self._drop(key)
            self._evict(self._max_bytes - size)
            self._entries[key] = copy, size, _versions(copy)
            self._bytes += size
        self._tally.add(puts=1, bytes_written=size)

    def get(self, key: str) -> CompactKV | None:
        check_key(key)
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._tally.add(misses=1)
                return None
            entry, size, versions = found
            intact = _versions(entry) == versions
            if intact:
                self._entries.move_to_end(key)
            else:
                self._drop(key)
        if not intact:
            self._tally.add("overwritten", misses=1)
            logger.warning(
                "%s: entry %s is not served: its tensors were written to; clone what you change",
                self,
                key,
            )
            return None
        self._tally.add(hits=1, bytes_read=size)
        return entry

    def delete(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            deleted = self._drop(key)
        self._tally.add(deletes=deleted)
        return deleted

    def stats(self) -> StoreStats:
        with self._lock:
            return self._tally.read(
                entries=len(self._entries), bytes=self._bytes, max_bytes=self._max_bytes
            )

    def verify(self) -> VerifyReport:
        """Drops entries whose tensors were written to. Doesn't count as a use of the others."""
        report = VerifyReport()
        with self._lock:
            for key, (entry, size, versions) in list(self._entries.items()):
                if _versions(entry) == versions:
                    report.entries += 1
                    report.bytes += size
                else:
                    report.bad[key] = "overwritten"
                    self._drop(key)
        return report

    def __contains__(self, key: object) -> bool:
        return check_key(key) in self._entries

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Forgets all entries. Tensors that were served stay valid."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _drop(self, key: str) -> bool:
        found = self._entries.pop(key, None)
        if found is not None:
            self._bytes -= found[1]
        return found is not None

    def _evict(self, most: int) -> None:
        while self._bytes > most:
            self._drop(next(iter(self._entries)))

    def _copy(self, entry: CompactKV, key: str) -> CompactKV:
        # Tensors made in inference mode have no version counter, by which writes are detected.
        with torch.inference_mode(False):
            rope = entry.rope
            if rope is not None:
                rope = replace(rope, inv_freq=rope.inv_freq.clone())
            return replace(
                entry,
                kv=self._host(entry.kv),
                scales=None if entry.scales is None else self._host(entry.scales),
                positions=entry.positions.clone(),
                rope=rope,
                key=key,
            )

    def _host(self, tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
        return memory.copy_(tensor.detach())


def _tensors(entry: CompactKV) -> list[Tensor]:
    parts = [entry.kv, entry.scales, entry.positions, entry.rope and entry.rope.inv_freq]
    return [part for part in parts if part is not None]


def _versions(entry: CompactKV) -> list[int]:
    return [tensor._version for tensor in _tensors(entry)]
