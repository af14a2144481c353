"""``TieredStore``: several stores as one, small and fast ones above large and slow ones."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.background import Background
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    Tally,
    VerifyReport,
    key_of,
    logger,
    may_serve,
)
from voco_model.kv_store.format import check_key
from voco_model.kv_store.levels import Keys, Level, Reading
from voco_model.kv_store.sizes import byte_count

_READ_AGAIN = 2  # times, for entries that were put or deleted while they were read


@dataclass
class TieredStats(StoreStats):
    """Statistics of a ``TieredStore`` and of its tiers.

    Attributes:
        hits, misses, failures, puts, put_failures, deletes, bytes_read, bytes_written: of calls to the
            tiered store. ``put_failures`` counts puts that no durable tier accepted.
        promotions: entries copied into a tier above the one that served them.
        background_failures: background writes to a tier that failed or found the queue full. Each one is
            logged.
        waiting: background writes not done yet.
        tiers: the statistics of each tier, uppermost first.
    """

    promotions: int = 0
    background_failures: int = 0
    waiting: int = 0
    tiers: list[StoreStats] = field(default_factory=list)


@dataclass
class TieredReport(VerifyReport):
    """``VerifyReport`` of a ``TieredStore``: the sum over its tiers, so an entry counts in each that has
    it.

    Attributes:
        tiers: the report of each tier, uppermost first.
    """

    tiers: list[VerifyReport] = field(default_factory=list)


class TieredStore(Store):
    """Several stores as one, the fastest first: memory, disk, remote.

    ``put`` writes from the top down to the first durable tier (one whose entries outlive this process)
    and then returns. If a tier can't store the entry, that is counted and logged, and the next one is
    tried; if no durable tier can, ``put`` raises the last one's error. The tiers below get the entry in
    the background; a write that fails there, or finds the queue full, is counted and logged. ``flush``
    waits for them.

    Once a put or delete has returned, no tier serves the previous entry. A tier that couldn't store an
    entry isn't asked for its key until the previous one is deleted there. This holds within one process.
    A tier in this process's memory doesn't see another process's puts, which matters only for keys of
    your own: ``image_key`` never gives two entries the same key.

    ``get`` asks from the top, and a hit copies the entry into the tiers above: into memory before it
    returns, into others in the background. A tier is asked only for keys that those above don't have, so
    a slow one never delays a hit above it.

    ``close`` waits up to ``close_timeout`` seconds for the background writes, logs what it left undone,
    and closes the tiers. An interpreter that exits without it waits 5 seconds at most.

    Args:
        tiers: stores, the uppermost first.
        max_waiting_bytes: total size of the entries waiting for one tier, as an int or text such as
            "256MiB"; a single one may be larger.
        close_timeout: seconds.

    Raises:
        ValueError: no tier, or tiers for different models.
    """

    def __init__(
        self,
        tiers: Sequence[Store],
        *,
        max_waiting_bytes: int | str = 256 * 2**20,
        close_timeout: float = 5.0,
    ) -> None:
        max_waiting_bytes = byte_count("max_waiting_bytes", max_waiting_bytes, at_least=0)
        self.tiers = list(tiers)
        if not self.tiers:
            raise ValueError("expected at least one tier, got none; pass stores, the fastest first")
        for tier in self.tiers:
            if not isinstance(tier, Store):
                raise TypeError(
                    f"expected tiers that are stores, got {type(tier).__name__}; use open_store"
                )
        models = {tier.fingerprint for tier in self.tiers} - {None}
        if len(models) > 1:
            raise ValueError(
                f"expected tiers for one model, got fingerprints {sorted(models)}; use the same one"
            )
        self.fingerprint = next(iter(models), None)
        self._close_timeout = close_timeout
        self._tally = Tally(TieredStats())
        self._keys = Keys()
        self._levels = [
            Level(tier, self._tally, max_waiting_bytes, self._keys) for tier in self.tiers
        ]
        self._prefetcher = Background(_weakly(self._promote_all), 4096, "voco-kv-prefetch", 16)

    def __repr__(self) -> str:
        return f"TieredStore({self.tiers})"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        key = key_of(entry, key, self.fingerprint)
        with self._keys.writing(key):
            refusal = self._put(key, entry)
        if refusal is not None:
            self._tally.add(put_failures=1)
            raise refusal
        self._tally.add(puts=1, bytes_written=entry.nbytes)

    def _put(self, key: str, entry: CompactKV) -> Exception | None:
        """Puts an entry into the tiers. Returns the last error if no durable tier has stored it."""
        refused: list[Level] = []
        took, acknowledged, refusal = False, False, None
        for level in self._levels:
            if acknowledged:
                level.later(key, entry)
                continue
            try:
                level.put(key, entry)
            except (OSError, ValueError) as error:
                logger.warning("%s: put of %s failed: %s", level.tier, key, error)
                refused.append(level)
                if refusal is None or level.tier.durable:
                    refusal = error
            else:
                took, acknowledged = True, level.tier.durable
        if acknowledged or (took and not any(tier.durable for tier in self.tiers)):
            for level in refused:
                level.forget(key)
            return None
        if took:  # served from memory; once evicted there, the previous one must not come back
            for level in refused:
                level.distrust(key)
        return refusal

    def get(self, key: str) -> CompactKV | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """As ``Store.get_many``: each tier is asked once, for all keys that those above don't have."""
        keys = [check_key(key) for key in keys]
        found = self._read(list(dict.fromkeys(keys)))
        entries = [found.get(key) for key in keys]
        hits = [entry for entry in entries if entry is not None]
        self._tally.add(
            hits=len(hits),
            misses=len(keys) - len(hits),
            bytes_read=sum(entry.nbytes for entry in hits),
        )
        return entries

    def prefetch(self, keys: Iterable[str]) -> None:
        """Copies entries into the uppermost tier, in the background. Returns immediately.

        At most 4096 keys wait at a time; further ones are left to ``get``.
        """
        for key in keys:
            self._prefetcher.add(check_key(key), None, 1)

    def delete(self, key: str) -> bool:
        """As ``Store.delete``, in all tiers.

        Raises:
            OSError: a tier couldn't delete it. The other tiers have.
        """
        check_key(key)
        deleted, refusal = False, None
        with self._keys.writing(key):
            for level in reversed(self._levels):
                try:
                    deleted |= level.delete(key)
                except OSError as error:
                    refusal = error
        if refusal is not None:
            raise refusal
        self._tally.add(deletes=deleted)
        return deleted

    def hold(self, key: str) -> AbstractContextManager[bool]:
        """As ``Store.hold``, in the uppermost tier that supports it."""
        for tier in self.tiers:
            if type(tier).hold is not Store.hold:
                return tier.hold(key)
        return super().hold(key)

    def stats(self) -> TieredStats:
        return self._tally.read(
            waiting=sum(len(level.background) for level in self._levels),
            tiers=[tier.stats() for tier in self.tiers],
        )

    def verify(self) -> TieredReport:
        """Verifies each tier. See ``TieredReport``."""
        report = TieredReport(tiers=[tier.verify() for tier in self.tiers])
        for tier in report.tiers:
            report.entries += tier.entries
            report.bytes += tier.bytes
            report.bad = {**tier.bad, **report.bad}
            report.added += tier.added
            report.dropped += tier.dropped
        return report

    def __contains__(self, key: object) -> bool:
        return any(key in tier for tier in self.tiers)

    def __iter__(self) -> Iterator[str]:
        seen = set()
        for tier in self.tiers:
            for key in tier:
                if key not in seen:
                    seen.add(key)
                    yield key

    def flush(self, timeout: float | None = None) -> bool:
        """Waits up to ``timeout`` seconds for the background writes. Returns whether all are done."""
        end = None if timeout is None else time.monotonic() + timeout
        # Prefetching first, because it adds to the others' work.
        backgrounds = [self._prefetcher, *(level.background for level in self._levels)]
        return all([background.wait(end) for background in backgrounds])

    def close(self) -> None:
        self.flush(self._close_timeout)
        self._prefetcher.drop("the store was closed")
        for level in self._levels:
            self._tally.add(background_failures=level.background.drop("the store was closed"))
            level.tier.close()

    def _read(self, keys: list[str]) -> dict[str, CompactKV]:
        """Those of the entries that there are, promoted into the tiers above the ones that had them.

        Entries that are put or deleted meanwhile are read again.
        """
        found: dict[str, CompactKV] = {}
        for _ in range(1 + _READ_AGAIN):
            readings = {key: self._keys.read(key) for key in keys}
            for key in keys:
                found.pop(key, None)
            found.update(self._read_once(readings))
            keys = [key for key, reading in readings.items() if reading.outdated]
            if not keys:
                break
        return found

    def _read_once(self, readings: dict[str, Reading]) -> dict[str, CompactKV]:
        found: dict[str, CompactKV] = {}
        for depth, level in enumerate(self._levels):
            missing = [key for key in readings if key not in found and level.current(key)]
            if not missing:
                continue
            try:
                entries = level.tier.get_many(missing)
            except OSError as error:  # a store shouldn't raise this here
                self._tally.add("unreadable")
                logger.warning("%s: get of %d entries failed: %s", level.tier, len(missing), error)
                continue
            here = {
                key: entry
                for key, entry in zip(missing, entries, strict=True)
                if entry is not None and may_serve(self, entry, key, self._tally)
            }
            found.update(here)
            for above in self._levels[:depth]:
                for key, entry in here.items():
                    above.promote(key, entry, readings[key])
        return found

    def _promote_all(self, jobs: list[tuple[str, Any]]) -> None:
        self._read([key for key, _ in jobs if key not in self.tiers[0]])


def _weakly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method, without keeping its object alive from a thread."""
    reference = weakref.WeakMethod(method)

    def call(argument: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(argument)

    return call
