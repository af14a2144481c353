"""What every store of compact entries can do."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import load_into
from voco_model.kv_store.format import check_key

logger = logging.getLogger("voco_model.kv_store")


@dataclass
class StoreStats:
    """What a store holds, and what this handle of it did since it was opened.

    Attributes:
        entries, bytes: in the store, all processes' together; None where it can't say.
        max_bytes: its bound; None without one.
        hits, misses: of ``get``, ``get_many`` and ``reader``. An entry that isn't served is a miss.
        failures: misses that weren't plain absence, by reason: those of ``EntryError`` and
            "unreadable", and whatever else a kind of store may meet.
        puts, deletes: that succeeded.
        put_failures: puts that raised.
        bytes_read, bytes_written: of entries served and of entries kept.
    """

    entries: int | None = None
    bytes: int | None = None
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    puts: int = 0
    put_failures: int = 0
    deletes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


_renewals: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def after_fork(owner: Any, renew: Callable[[Any], None]) -> None:
    """Calls ``renew(owner)`` in each process forked from now on, for as long as ``owner`` lives.

    A lock that a thread of the parent held stays locked in the child, where that thread doesn't run.
    """
    _renewals[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_renewals.items()):
        try:
            renew(owner)
        except Exception:  # os.fork prints it and goes on; so do the others
            logger.exception("%r could not be made ready for use after a fork", type(owner))


os.register_at_fork(after_in_child=_renew_all)


class Tally:
    """A handle's counters, added to from any thread.

    Args:
        stats: the counters, all as they begin; a subclass of ``StoreStats`` for a store that has more.
    """

    def __init__(self, stats: StoreStats) -> None:
        self._stats = stats
        self._lock = threading.Lock()
        after_fork(self, Tally._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def add(self, failure: str | None = None, **amounts: int) -> None:
        """Adds to counters by their names, and 1 to the failures of a reason."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)
            if failure is not None:
                failures = self._stats.failures
                failures[failure] = failures.get(failure, 0) + 1

    def read(self, **present: int | None) -> Any:
        """A copy of the counters, with what only the store itself knows at present."""
        with self._lock:
            return replace(self._stats, failures=dict(self._stats.failures), **present)


class StoreUnavailable(OSError):  # noqa: N818
    """A store that can't be reached or can't answer now. Later it may."""


class Store(ABC):
    """Entries by key. Safe to share among threads.

    A key is 64 lower-case hex digits (``voco_model.image_key``); any other is a ValueError. ``get`` and
    ``get_many`` serve intact entries only, and raise for nothing that a disk or a peer may do: what is
    corrupt, truncated, foreign, of another version or model, or can't be reached is a miss, counted in
    ``stats`` and logged under "voco_model.kv_store". ``put`` returns when the entry is kept, and raises
    OSError when it couldn't be; who puts behind an answer catches that.
    """

    durable: ClassVar[bool] = True  # whether entries outlive this process
    fingerprint: str | None = None  # of the model whose entries it takes; None takes any

    @abstractmethod
    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """Keeps an entry, in place of one that had its key.

        Args:
            entry: on any device; it is stored as it is, on the CPU.
            key: ``entry.key`` by default.

        Raises:
            ValueError: no key, one that isn't 64 lower-case hex digits, or an entry of another model
                than the store is for.
            OSError: it couldn't be kept. Other entries are not harmed.
        """

    @abstractmethod
    def get(self, key: str) -> CompactKV | None:
        """The entry of a key, on the CPU; None if there is none that may be served."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Removes an entry; whether there was one."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """What the store holds and what this handle did."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether there is something under a key, intact or not."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The keys, in no particular order; entries that come or go meanwhile may be among them."""

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """``get`` of each key, in their order."""
        return [self.get(key) for key in keys]

    def load_into(
        self, cache: Any, keys: str | Sequence[str | Sequence[str]], **placement
    ) -> list[str]:
        """Puts the entries of keys into a key/value cache, all or none.

        Args:
            cache, **placement: as in ``voco_kernels.load_into``.
            keys: in the place of entries: for each row a key, or a sequence of them.

        Returns:
            The keys that are missing. If there are any, the slots may hold anything and the cache's
            length is what it was: compress these images, put their entries, and load again.

        Raises:
            ValueError: a key that is none; and as ``voco_kernels.load_into``.
        """
        rows = rows_of_keys(keys)
        flat = [key for row in rows for key in row]
        found = dict(zip(flat, self.get_many(flat), strict=True))
        missing = [key for key, entry in found.items() if entry is None]
        if not missing:
            load_into(cache, [[found[key] for key in row] for row in rows], **placement)
        return missing

    def prefetch(self, keys: Iterable[str]) -> None:  # noqa: B027  (nothing is a fair answer)
        """Says that these will be asked for soon. Returns at once."""

    def hold(self, key: str) -> AbstractContextManager[bool]:
        """Keeps an entry from being evicted while the context lasts; gives whether it is there.

        It is the entry that is there now: one put in its place meanwhile is not held.
        """
        return nullcontext(key in self)

    def clear(self) -> None:
        """Deletes every entry."""
        for key in list(self):
            self.delete(key)

    def close(self) -> None:  # noqa: B027  (not every store has something to let go of)
        """Lets go of files and connections. Entries stay; tensors that were served stay valid."""

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True  # an empty store is still a store: `store or default` must not drop it

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def rows_of_keys(keys: str | Sequence[str | Sequence[str]]) -> list[list[str]]:
    """For each row its keys, checked."""
    rows = [
        [row] if isinstance(row, str) else list(row)
        for row in ([keys] if isinstance(keys, str) else keys)
    ]
    for row in rows:
        for key in row:
            check_key(key)
    return rows


def key_of(entry: CompactKV, key: str | None, fingerprint: str | None) -> str:
    """The key to put an entry under, once entry and key are fit for a store.

    Raises:
        TypeError, ValueError: as ``Store.put``.
    """
    if not isinstance(entry, CompactKV):
        raise TypeError(f"expected a CompactKV, got {type(entry).__name__}; make one with compress")
    if fingerprint is not None and entry.fingerprint != fingerprint:
        raise ValueError(
            f"expected an entry of the model with fingerprint {fingerprint!r}, got one of "
            f"{entry.fingerprint!r}; open a store for that model, or one without fingerprint"
        )
    key = key or entry.key
    if not key:
        raise ValueError(
            "expected a key, got an entry without one and none beside it; make one with "
            "voco_model.image_key"
        )
    return check_key(key)


def may_serve(store: Any, entry: CompactKV, key: str, tally: Tally) -> bool:
    """Whether an intact entry is of the store's model; another model's is counted and logged."""
    if store.fingerprint in (None, entry.fingerprint):
        return True
    tally.add("model")
    logger.warning(
        "%s: entry %s is not served, it is of the model with fingerprint %r; left where it is",
        store,
        key,
        entry.fingerprint,
    )
    return False
