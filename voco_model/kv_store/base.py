"""``Store``: the interface of every store of compact entries, and what its implementations share."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import load_into
from voco_model.kv_store.format import check_key

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("voco_model.kv_store")


@dataclass
class StoreStats:
    """What a store holds, and what this handle has done since it was opened.

    Attributes:
        entries, bytes: in the store, put there by any process; None if the store can't tell.
        max_bytes: the store's capacity; None if it has no limit.
        hits, misses: results of ``get``, ``get_many`` and ``reader``. An entry that is there but isn't
            served counts as a miss.
        failures: misses other than plain absence, by reason: those of ``EntryError``, "unreadable", and
            others that a kind of store documents.
        puts, deletes: successful ones.
        put_failures: puts that raised.
        bytes_read, bytes_written: total size of the entries served and of the entries put.
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


@dataclass
class VerifyReport:
    """What ``Store.verify`` found and repaired.

    Attributes:
        entries, bytes: intact entries, and their total size.
        bad: for each entry that is no longer served, its key (a file's name, if that isn't a key) and
            the reason, as in ``StoreStats.failures``.
        added: keys of entries that an index lacked, or had with another size.
        dropped: keys in an index that had no entry.
    """

    entries: int = 0
    bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing had to be repaired."""
        return not (self.bad or self.added or self.dropped)


_renewals: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def after_fork(owner: Any, renew: Callable[[Any], None]) -> None:
    """Calls ``renew(owner)`` in every process forked from now on, for as long as ``owner`` lives.

    Needed for locks: one that another thread of the parent held stays locked in the child, where that
    thread doesn't exist.
    """
    _renewals[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_renewals.items()):
        try:
            renew(owner)
        except Exception:  # os.fork would print it and carry on; the other owners must be renewed
            logger.exception("renewing a %s after a fork failed", type(owner).__name__)


os.register_at_fork(after_in_child=_renew_all)


class Tally:
    """A handle's counters. Thread-safe.

    Args:
        stats: their initial values; a subclass of ``StoreStats`` for a store with more of them.
    """

    def __init__(self, stats: StoreStats) -> None:
        self._stats = stats
        self._lock = threading.Lock()
        after_fork(self, Tally._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def add(self, failure: str | None = None, **amounts: int) -> None:
        """Adds to the named counters, and 1 to ``failures`` for a reason."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)
            if failure is not None:
                failures = self._stats.failures
                failures[failure] = failures.get(failure, 0) + 1

    def read(self, **present: Any) -> Any:
        """A copy of the counters, completed with the values that only the store knows."""
        with self._lock:
            return replace(self._stats, failures=dict(self._stats.failures), **present)


class StoreUnavailable(OSError):  # noqa: N818
    """The store can't be reached or can't answer at the moment; a later call may succeed."""


class Store(ABC):
    """A mapping from keys to compact entries. Thread-safe.

    A key is 64 lower-case hex digits (``voco_model.image_key``); any other raises ValueError.

    ``get`` and ``get_many`` return intact entries only and never raise because of a disk or a server: an
    entry that is corrupt, truncated, foreign, of another version or model, or out of reach is a miss,
    counted in ``stats`` and logged under "voco_model.kv_store".

    ``put`` returns once the entry is stored, and raises OSError if it can't be. A caller that already
    has its answer should catch that.
    """

    durable: ClassVar[bool] = True  # whether entries outlive this process
    fingerprint: str | None = None  # of the model whose entries are accepted; None accepts any

    @abstractmethod
    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """Stores an entry, replacing the one under its key, if any.

        Args:
            entry: on any device; stored unchanged, on the CPU.
            key: by default ``entry.key``.

        Raises:
            ValueError: no key, one that isn't 64 lower-case hex digits, or an entry of another model
                than the store's.
            OSError: the entry can't be stored. Other entries are unaffected.
        """

    @abstractmethod
    def get(self, key: str) -> CompactKV | None:
        """The entry under a key, on the CPU; None if there is no intact one."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Removes an entry. Returns whether there was one."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """What the store holds and what this handle has done."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether there is something under a key, intact or not."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The keys, in no particular order; keys added or removed meanwhile may be among them."""

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """``get`` for each key, in order."""
        return [self.get(key) for key in keys]

    def load_into(
        self, cache: Any, keys: str | Sequence[str | Sequence[str]], **placement: Any
    ) -> list[str]:
        """Loads the entries under these keys into a key/value cache, all or none.

        Args:
            cache, **placement: as for ``voco_kernels.load_into``.
            keys: for each row a key, or a sequence of keys.

        Returns:
            The missing keys. If there are any, the cache's length is unchanged and the contents of the
            slots are undefined: compress these images, put their entries, and call this again.

        Raises:
            ValueError: an invalid key, or as ``voco_kernels.load_into``.
        """
        rows = rows_of_keys(keys)
        flat = [key for row in rows for key in row]
        found = dict(zip(flat, self.get_many(flat), strict=True))
        missing = [key for key, entry in found.items() if entry is None]
        if not missing:
            there = {key: entry for key, entry in found.items() if entry is not None}
            load_into(cache, [[there[key] for key in row] for row in rows], **placement)
        return missing

    def verify(self) -> VerifyReport:
        """Reads every entry, and removes from service those that aren't intact.

        By default through ``get``, which counts as a use of each entry.
        """
        report = VerifyReport()
        for key in self:
            entry = self.get(key)
            if entry is not None:
                report.entries += 1
                report.bytes += entry.nbytes
            elif key in self:  # otherwise deleted since the keys were listed
                report.bad[key] = "unreadable"
        return report

    def prefetch(self, keys: Iterable[str]) -> None:  # noqa: B027  (doing nothing is allowed)
        """Announces that these keys will be read soon. Returns immediately."""

    def hold(self, key: str) -> AbstractContextManager[bool]:
        """Context in which an entry isn't evicted; its value is whether the entry is there.

        This applies to the entry that is there now, not to one that replaces it.
        """
        return nullcontext(key in self)

    def clear(self) -> None:
        """Deletes every entry."""
        for key in list(self):
            self.delete(key)

    def close(self) -> None:  # noqa: B027  (not every store has something to release)
        """Releases files and connections. Entries stay; tensors from ``get`` stay valid."""

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True  # an empty store is still a store: `store or default` must not drop it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def rows_of_keys(keys: str | Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The keys of each row, validated."""
    rows = [
        [row] if isinstance(row, str) else list(row)
        for row in ([keys] if isinstance(keys, str) else keys)
    ]
    for row in rows:
        for key in row:
            check_key(key)
    return rows


def key_of(entry: CompactKV, key: str | None, fingerprint: str | None) -> str:
    """The key under which to put an entry, after checking both.

    Raises:
        TypeError, ValueError: as ``Store.put``.
    """
    if not isinstance(entry, CompactKV):
        raise TypeError(f"expected a CompactKV, got {type(entry).__name__}; make one with compress")
    if fingerprint is not None and entry.fingerprint != fingerprint:
        raise ValueError(
            f"expected an entry of the model with fingerprint {fingerprint!r}, got "
            + _wrong_model(entry.fingerprint)
        )
    key = key or entry.key
    if not key:
        raise ValueError(
            "expected a key, got none with the entry and none as an argument; make one with "
            "voco_model.image_key"
        )
    return check_key(key)


def _wrong_model(fingerprint: str) -> str:
    if fingerprint:
        return f"one of {fingerprint!r}; open a store for that model, or one without a fingerprint"
    return (
        "one without a fingerprint; if that model made it, put dataclasses.replace(entry, "
        "fingerprint=store.fingerprint), or let compress(..., store=store) fill it in"
    )


def may_serve(store: Any, entry: CompactKV, key: str, tally: Tally) -> bool:
    """Whether an intact entry is of the store's model; if not, that is counted and logged."""
    if store.fingerprint in (None, entry.fingerprint):
        return True
    tally.add("model")
    logger.warning(
        "%s: entry %s is not served: it belongs to the model with fingerprint %r; it was left in place",
        store,
        key,
        entry.fingerprint,
    )
    return False
