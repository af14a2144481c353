"""``TieredStore``: fast and small above slow and large, as one store."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from voco_kernels.kv import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    after_fork,
    key_of,
    logger,
)
from voco_model.kv_store.disk import VerifyReport
from voco_model.kv_store.format import check_key

_RUNNING_SECONDS = 30.0  # that a delete waits for a write of its key that has begun
_EXIT_SECONDS = 5.0  # for what is in the background when the interpreter exits


@dataclass
class TieredStats(StoreStats):
    """What came of calls to the whole, and what its tiers say.

    Attributes:
        hits, misses, failures, puts, put_failures, deletes, bytes_read, bytes_written: of calls to the
            tiered store. ``put_failures`` counts puts that no durable tier took.
        promotions: entries copied into a tier above the one that served them.
        background_failures: writes to a tier, as promotions or behind a put, that failed or found the
            queue full. Each one is logged.
        waiting: writes that are in the background now.
        tiers: the statistics of each tier, uppermost first.
    """

    promotions: int = 0
    background_failures: int = 0
    waiting: int = 0
    tiers: list[StoreStats] = field(default_factory=list)


class TieredStore(Store):
    """Several stores as one, the fastest first: memory, disk, remote.

    ``put`` writes down to the first durable tier (one whose entries outlive this process) that takes
    the entry, and then returns: the entry is acknowledged. If a tier can't take it, that is counted and
    logged, and the next one is asked; if no durable tier can, ``put`` raises what the last one said. The
    tiers below get the entry in the background; a write that fails there, or finds the queue full, is
    counted and logged. ``flush`` waits for them.

    ``get`` asks from above, and a hit puts the entry into the tiers above it: into memory before it
    returns, into others in the background. A tier is asked only for what those above don't have, so a
    slow one never delays a hit above it.

    ``close`` waits up to ``close_timeout`` seconds for the background, says what it left undone, and
    closes the tiers. An interpreter that exits without it waits 5 seconds at most.

    Args:
        tiers: stores, the uppermost first.
        max_waiting_bytes: of the entries that wait for one tier; a single one may be larger.
        close_timeout: seconds.

    Raises:
        ValueError: no tier.
    """

    def __init__(
        self,
        tiers: Sequence[Store],
        *,
        max_waiting_bytes: int = 256 * 2**20,
        close_timeout: float = 5.0,
    ) -> None:
        self.tiers = list(tiers)
        if not self.tiers:
            raise ValueError("expected at least one tier, got none")
        for tier in self.tiers:
            if not isinstance(tier, Store):
                raise TypeError(f"expected tiers that are stores, got {type(tier).__name__}")
        self._close_timeout = close_timeout
        self._tally = Tally(TieredStats())
        self._levels = [_Level(tier, self._tally, max_waiting_bytes) for tier in self.tiers]
        self._prefetcher = _Background(_weakly(self._promote_all), 4096, "voco-kv-prefetch", 16)

    def __repr__(self) -> str:
        return f"TieredStore({self.tiers})"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        key = key_of(entry, key, None)
        taken, acknowledged, refusal = False, False, None
        for level in self._levels:
            if acknowledged:
                level.later(key, entry, None)
                continue
            try:
                level.tier.put(entry, key)
            except (OSError, ValueError) as error:
                logger.warning("%s: put of %s failed: %s", level.tier, key, error)
                if refusal is None or level.tier.durable:
                    refusal = error
            else:
                taken, acknowledged = True, level.tier.durable
        if acknowledged or (taken and not any(tier.durable for tier in self.tiers)):
            self._tally.add(puts=1, bytes_written=entry.nbytes)
            return
        self._tally.add(put_failures=1)
        raise refusal

    def get(self, key: str) -> CompactKV | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """As ``Store.get_many``: each tier is asked once, for all that those above it don't have."""
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
        """Brings entries into the uppermost tier, in the background. Returns at once.

        Of more than 4096 keys that wait at a time the rest is left to ``get``.
        """
        for key in keys:
            self._prefetcher.add(check_key(key), None, 1)

    def delete(self, key: str) -> bool:
        """As ``Store.delete``, in all tiers.

        Raises:
            OSError: a tier couldn't be asked, after all others were.
        """
        check_key(key)
        deleted, refusal = False, None
        for level in reversed(self._levels):  # nothing is promoted from what is gone below
            try:
                deleted |= level.delete(key)
            except OSError as error:
                refusal = error
        if refusal is not None:
            raise refusal
        self._tally.add(deletes=deleted)
        return deleted

    def hold(self, key: str) -> AbstractContextManager[bool]:
        """As ``Store.hold``, in the uppermost tier that evicts what nobody holds."""
        for tier in self.tiers:
            if type(tier).hold is not Store.hold:
                return tier.hold(key)
        return super().hold(key)

    def stats(self) -> TieredStats:
        return self._tally.read(
            waiting=sum(len(level.background) for level in self._levels),
            tiers=[tier.stats() for tier in self.tiers],
        )

    def verify(self) -> list[VerifyReport | None]:
        """What each tier's ``verify`` found; None of one that has nothing to verify."""
        return [tier.verify() if hasattr(tier, "verify") else None for tier in self.tiers]

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
        """Waits until nothing is in the background; whether it came to that in ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        # Prefetching first, because it makes more for the others to do.
        backgrounds = [self._prefetcher, *(level.background for level in self._levels)]
        return all([background.wait(end) for background in backgrounds])

    def close(self) -> None:
        self.flush(self._close_timeout)
        self._prefetcher.drop("the store was closed")
        for level in self._levels:
            self._tally.add(background_failures=level.background.drop("the store was closed"))
            level.tier.close()

    def _read(self, keys: list[str]) -> dict[str, CompactKV]:
        """What there is of these entries, promoted into the tiers above those that had them."""
        deletes = [level.deletes for level in self._levels]
        found: dict[str, CompactKV] = {}
        for depth, tier in enumerate(self.tiers):
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            try:
                entries = tier.get_many(missing)
            except OSError as error:  # which a store shouldn't raise here
                self._tally.add("unreadable")
                logger.warning("%s: get of %d entries failed: %s", tier, len(missing), error)
                continue
            here = {key: e for key, e in zip(missing, entries, strict=True) if e is not None}
            found.update(here)
            for level, before in zip(self._levels[:depth], deletes, strict=False):
                for key, entry in here.items():
                    if level.tier.durable:
                        level.later(key, entry, before)
                    else:
                        level.write(key, entry, before)
        return found

    def _promote_all(self, jobs: list[tuple[str, Any]]) -> None:
        self._read([key for key, _ in jobs if key not in self.tiers[0]])


class _Level:
    """A tier, and what is written to it behind the back of who puts and gets.

    Attributes:
        deletes: how many there were. What was read before a delete isn't promoted after it: it might
            bring back what is gone.
    """

    def __init__(self, tier: Store, tally: Tally, max_waiting_bytes: int) -> None:
        self.tier = tier
        self.deletes = 0
        self._tally = tally
        self.background = _Background(self._do, max_waiting_bytes, f"voco-kv-{type(tier).__name__}")
        self._unlock()
        after_fork(self, _Level._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def later(self, key: str, entry: CompactKV, deletes: int | None) -> None:
        """``write``, in the background."""
        # A copy, because who put or got the entry may write to its tensors once the call is over.
        if not self.background.add(key, (_copy(entry), deletes), entry.nbytes):
            self._tally.add(background_failures=1)
            logger.warning("%s: put of %s left out: too much waits for it", self.tier, key)

    def write(self, key: str, entry: CompactKV, deletes: int | None) -> None:
        """Put an entry that another tier has; a promotion unless there was a delete since."""
        try:
            if deletes is None:
                self.tier.put(entry, key)
                return
            with self._lock:  # which a delete waits for
                if self.deletes != deletes:
                    return
                self.tier.put(entry, key)
        except Exception as error:  # whatever it is, nobody else would hear of it
            self._tally.add(background_failures=1)
            logger.warning(
                "%s: put of %s, which another tier has, failed: %s", self.tier, key, error
            )
        else:
            self._tally.add(promotions=1)

    def delete(self, key: str) -> bool:
        self.background.cancel(key)
        with self._lock:
            self.deletes += 1
        return self.tier.delete(key)

    def _do(self, jobs: list[tuple[str, tuple[CompactKV, int | None]]]) -> None:
        for key, (entry, deletes) in jobs:
            self.write(key, entry, deletes)


class _Background:
    """Jobs by key, done in order by a daemon thread that lives while there are any.

    Args:
        do: called with up to ``batch`` jobs at a time, ``(key, job)``.
        limit: of the costs of all jobs that wait; a single one may cost more.
    """

    def __init__(
        self,
        do: Callable[[list[tuple[str, Any]]], None],
        limit: int,
        name: str,
        batch: int = 1,
    ) -> None:
        self._do, self._limit, self._name, self._batch = do, limit, name, batch
        self._begin()
        after_fork(self, _Background._begin)
        _backgrounds.add(self)

    def _begin(self) -> None:
        """Also in a forked child: what waits is the parent's to do."""
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._cost = 0
        self._running: list[str] = []
        self._alive = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting) + len(self._running)

    def add(self, key: str, job: Any, cost: int) -> bool:
        """A job, in place of one of that key that waits; False if there is no room for it."""
        with self._changed:
            self._forget(key)
            if self._waiting and self._cost + cost > self._limit:
                return False
            self._waiting[key] = job, cost
            self._cost += cost
            if not self._alive:
                try:
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                except RuntimeError:  # no more threads, or the interpreter is about to exit
                    self._forget(key)
                    return False
                self._alive = True
            return True

    def cancel(self, key: str) -> None:
        """No job of this key is done after this.

        Raises:
            StoreUnavailable: one that has begun doesn't end.
        """
        with self._changed:
            self._forget(key)
            if not self._changed.wait_for(lambda: key not in self._running, _RUNNING_SECONDS):
                raise StoreUnavailable(
                    f"expected a write of {key} in the background to end in {_RUNNING_SECONDS} s"
                )

    def wait(self, end: float | None) -> bool:
        """Whether all is done by ``end``, in monotonic seconds."""
        timeout = None if end is None else max(end - time.monotonic(), 0)
        with self._changed:
            return self._changed.wait_for(lambda: not self._alive, timeout)

    def drop(self, why: str) -> int:
        """Forget all that waits; says so and returns how many they are."""
        with self._changed:
            keys = list(self._waiting)
            self._waiting.clear()
            self._cost = 0
        if keys:
            logger.warning("%s: %d jobs left undone, because %s", self._name, len(keys), why)
        return len(keys)

    def _forget(self, key: str) -> None:
        self._cost -= self._waiting.pop(key, (None, 0))[1]

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._do(jobs)
            except Exception:
                logger.exception("%s: failed at %s", self._name, self._running)
            # No tensor may die here once nothing is left to wait for and the program may end: torch
            # aborts the process if a daemon thread frees one while the interpreter is taken apart.
            del jobs

    def _next(self) -> list[tuple[str, Any]]:
        jobs = []
        with self._changed:
            while self._waiting and len(jobs) < self._batch:
                key, (job, cost) = self._waiting.popitem(last=False)
                self._cost -= cost
                jobs.append((key, job))
            self._running = [key for key, _ in jobs]
            self._alive = bool(jobs)
            self._changed.notify_all()
        return jobs


_backgrounds: weakref.WeakSet[_Background] = weakref.WeakSet()


def _at_exit() -> None:
    end = time.monotonic() + _EXIT_SECONDS
    backgrounds = list(_backgrounds)
    for background in backgrounds:
        if not background.wait(end - _EXIT_SECONDS / 5):
            background.drop(f"the interpreter exits and waits {_EXIT_SECONDS:.3g} s for them")
    for background in backgrounds:  # what has begun may end, as long as it isn't stuck
        background.wait(end)


# Before threads are joined and can't be started any more, where Python has a place for that.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)


def _copy(entry: CompactKV) -> CompactKV:
    """With tensors of its own, on the CPU."""
    host = entry.to("cpu")
    if host is not entry:
        return host
    scales = None if entry.scales is None else entry.scales.clone()
    return replace(entry, kv=entry.kv.clone(), scales=scales, positions=entry.positions.clone())


def _weakly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method, as long as its object is there; so that a thread doesn't keep it."""
    reference = weakref.WeakMethod(method)

    def call(argument: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(argument)

    return call
