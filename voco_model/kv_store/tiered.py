"""``TieredStore``: fast and small above slow and large, as one store."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    VerifyReport,
    after_fork,
    key_of,
    logger,
    may_serve,
)
from voco_model.kv_store.format import check_key

_RUNNING_SECONDS = 30.0  # that a put or delete waits for another write of its key that has begun
_READ_AGAIN = 2  # times, where entries were put or deleted while they were read
_MOST_STALE = 1 << 20  # keys that a tier may have old entries of
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

    What a put has replaced, or a delete removed, isn't served from any tier once that call has returned.
    A tier that couldn't take an entry isn't asked for its key until the one before is deleted there.
    This holds for calls of one process. A tier in this process's memory doesn't know of another
    process's puts, which matters only for keys of your own: ``image_key`` never names two entries alike.

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
        ValueError: no tier, or tiers for different models.
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
        models = {tier.fingerprint for tier in self.tiers} - {None}
        if len(models) > 1:
            raise ValueError(f"expected tiers for one model, got some for each of {sorted(models)}")
        self.fingerprint = next(iter(models), None)
        self._close_timeout = close_timeout
        self._tally = Tally(TieredStats())
        self._keys = _Keys()
        self._levels = [
            _Level(tier, self._tally, max_waiting_bytes, self._keys) for tier in self.tiers
        ]
        self._prefetcher = _Background(_weakly(self._promote_all), 4096, "voco-kv-prefetch", 16)

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
        """Why no durable tier has taken it, if none has."""
        refused: list[_Level] = []
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
        if took:  # it is served from there: when that ends, not the one before again
            for level in refused:
                level.distrust(key)
        return refusal

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
        """What there is of these entries, promoted into the tiers above those that had them.

        What is put or deleted meanwhile is read again.
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

    def _read_once(self, readings: dict[str, _Reading]) -> dict[str, CompactKV]:
        found: dict[str, CompactKV] = {}
        for depth, level in enumerate(self._levels):
            missing = [key for key in readings if key not in found and level.current(key)]
            if not missing:
                continue
            try:
                entries = level.tier.get_many(missing)
            except OSError as error:  # which a store shouldn't raise here
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


class _Reading:
    """One key while it is read; ``outdated`` once a put or delete of it has ended."""

    __slots__ = ("__weakref__", "outdated")

    def __init__(self) -> None:
        self.outdated = False


class _Keys:
    """Keys that are being written, one write of each at a time, and those that are being read."""

    def __init__(self) -> None:
        self._begin()
        after_fork(self, _Keys._begin)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._written: set[str] = set()
        # Here for as long as a read or a promotion of its key keeps it.
        self._readings: weakref.WeakValueDictionary[str, _Reading] = weakref.WeakValueDictionary()

    def read(self, key: str) -> _Reading:
        with self._changed:
            reading = self._readings.get(key)
            if reading is None:
                reading = self._readings[key] = _Reading()
            return reading

    @contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """While an entry is put or deleted.

        Raises:
            StoreUnavailable: another write of the key doesn't end.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: key not in self._written, _RUNNING_SECONDS)
            if not free:
                raise StoreUnavailable(
                    f"another write of {key} has not ended in {_RUNNING_SECONDS} s"
                )
            self._written.add(key)
        try:
            yield
        finally:
            self._end(key, outdates=True)

    @contextmanager
    def promoting(self, key: str, reading: _Reading) -> Iterator[bool]:
        """While an entry that was read is copied; gives whether it may be: no put or delete of its key
        is under way, nor has one ended since it was read."""
        with self._changed:
            may = not reading.outdated and key not in self._written
            if may:
                self._written.add(key)
        try:
            yield may
        finally:
            if may:
                self._end(key, outdates=False)

    def _end(self, key: str, *, outdates: bool) -> None:
        with self._changed:
            reading = self._readings.pop(key, None) if outdates else None
            if reading is not None:
                reading.outdated = True
            self._written.discard(key)
            self._changed.notify_all()


class _Level:
    """A tier, and what is written to it in the background."""

    def __init__(self, tier: Store, tally: Tally, max_waiting_bytes: int, keys: _Keys) -> None:
        self.tier = tier
        self._tally = tally
        self._keys = keys
        # Keys of which it may have an entry that was replaced; None if they were too many to remember.
        self._stale: set[str] | None = set()
        self.background = _Background(self._do, max_waiting_bytes, f"voco-kv-{type(tier).__name__}")
        after_fork(self, _Level._begin_in_child)

    def _begin_in_child(self) -> None:
        # What waits in the parent may not be written yet when this process asks for it.
        for key in self.background.left_to_parent:
            self.distrust(key)

    def current(self, key: str) -> bool:
        """Whether the entry that the tier has, if any, is the one put last."""
        return self._stale is not None and key not in self._stale and key not in self.background

    def put(self, key: str, entry: CompactKV) -> None:
        self.background.cancel(key)  # or it would replace this one
        self.tier.put(entry, key)
        self._trust(key)

    def later(self, key: str, entry: CompactKV) -> None:
        """``put``, in the background."""
        # A copy, because the caller may write to the entry's tensors once the call is over.
        self._trust(key)  # once it is written: see current
        if self.background.add(key, (_copy(entry), None), entry.nbytes):
            return
        self.distrust(key)
        self._tally.add(background_failures=1)
        logger.warning("%s: put of %s left out: too much waits for it", self.tier, key)

    def promote(self, key: str, entry: CompactKV, reading: _Reading) -> None:
        """Copies an entry from a tier below, unless it is put or deleted meanwhile."""
        if not self.tier.durable:
            self._promote(key, entry, reading)
        elif not self.background.add(key, (_copy(entry), reading), entry.nbytes, replace=False):
            self._tally.add(background_failures=1)
            logger.warning("%s: put of %s left out: too much waits for it", self.tier, key)

    def delete(self, key: str) -> bool:
        self.background.cancel(key)
        deleted = self.tier.delete(key)
        self._trust(key)
        return deleted

    def forget(self, key: str) -> None:
        """Has the tier not serve what it has under a key."""
        self.distrust(key)
        if key not in self.background:  # a write that doesn't end would bring it back
            self._delete_old(key)

    def _delete_old(self, key: str) -> None:
        try:
            self.tier.delete(key)
        except OSError as error:
            logger.warning("%s: the old entry of %s is still there: %s", self.tier, key, error)
        else:
            self._trust(key)

    def distrust(self, key: str) -> None:
        """Has the tier not asked for a key until something is put or deleted there."""
        if self._stale is None:
            return
        self._stale.add(key)
        if len(self._stale) > _MOST_STALE:
            self._stale = None
            logger.error(
                "%s: it is not read any more, since it may have old entries of more than %d keys; "
                "open the store again when it works",
                self.tier,
                _MOST_STALE,
            )

    def _trust(self, key: str) -> None:
        if self._stale is not None:
            self._stale.discard(key)

    def _promote(self, key: str, entry: CompactKV, reading: _Reading) -> None:
        with self._keys.promoting(key, reading) as may:
            if may and self._write(key, entry):
                self._trust(key)
                self._tally.add(promotions=1)

    def _write(self, key: str, entry: CompactKV) -> bool:
        try:
            self.tier.put(entry, key)
        except Exception as error:  # whatever it is, no caller would hear of it
            self._tally.add(background_failures=1)
            logger.warning(
                "%s: put of %s, which another tier has, failed: %s", self.tier, key, error
            )
            return False
        return True

    def _do(self, jobs: list[tuple[str, tuple[CompactKV, _Reading | None]]]) -> None:
        for key, (entry, reading) in jobs:
            if reading is not None:
                self._promote(key, entry, reading)
            elif not self._write(key, entry):
                self.distrust(key)
                self._delete_old(key)


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
        self.left_to_parent: list[str] = []  # in a forked child
        self._begin()
        after_fork(self, _Background._begin_in_child)
        _backgrounds.add(self)

    def _begin_in_child(self) -> None:
        """What waits is the parent's to do."""
        self.left_to_parent = [*self._waiting, *self._running]
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._cost = 0
        self._running: list[str] = []
        self._alive = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting) + len(self._running)

    def __contains__(self, key: str) -> bool:
        """Whether a job of this key waits or runs."""
        with self._changed:
            return key in self._waiting or key in self._running

    def add(self, key: str, job: Any, cost: int, *, replace: bool = True) -> bool:
        """A job, in place of one of that key that waits; False if there is no room for it.

        Args:
            replace: otherwise it is dropped where a job of that key waits or runs.
        """
        with self._changed:
            if not replace and (key in self._waiting or key in self._running):
                return True
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
