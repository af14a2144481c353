"""``Level``: one tier of a ``TieredStore``, with its background writes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.background import RUNNING_SECONDS, Background
from voco_model.kv_store.base import Store, StoreUnavailable, Tally, after_fork, logger

_MOST_STALE = 1 << 20  # keys to remember for which a tier may have old entries


class Reading:
    """A key being read; ``outdated`` once a put or delete of it has ended."""

    __slots__ = ("__weakref__", "outdated")

    def __init__(self) -> None:
        self.outdated = False


class Keys:
    """The keys being written, at most one write of each at a time, and the keys being read."""

    def __init__(self) -> None:
        self._begin()
        after_fork(self, Keys._begin)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._written: set[str] = set()
        # Each lives as long as a read or promotion of its key refers to it.
        self._readings: weakref.WeakValueDictionary[str, Reading] = weakref.WeakValueDictionary()

    def read(self, key: str) -> Reading:
        with self._changed:
            reading = self._readings.get(key)
            if reading is None:
                reading = self._readings[key] = Reading()
            return reading

    @contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Context in which an entry is put or deleted.

        Raises:
            StoreUnavailable: another write of the key doesn't end in time.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: key not in self._written, RUNNING_SECONDS)
            if not free:
                raise StoreUnavailable(
                    f"another write of {key} has not ended in {RUNNING_SECONDS} s"
                )
            self._written.add(key)
        try:
            yield
        finally:
            self._end(key, outdates=True)

    @contextmanager
    def promoting(self, key: str, reading: Reading) -> Iterator[bool]:
        """Context in which an entry that was read is copied to another tier. Its value is whether that
        is allowed: no put or delete of the key is running, nor has one ended since the read."""
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


class Level:
    """A tier and its background writes."""

    def __init__(self, tier: Store, tally: Tally, max_waiting_bytes: int, keys: Keys) -> None:
        self.tier = tier
        self._tally = tally
        self._keys = keys
        # Keys for which it may have a replaced entry; None if there were too many to remember.
        self._stale: set[str] | None = set()
        self.background = Background(self._do, max_waiting_bytes, f"voco-kv-{type(tier).__name__}")
        after_fork(self, Level._begin_in_child)

    def _begin_in_child(self) -> None:
        # The parent's waiting writes may not be done when this process reads these keys.
        for key in self.background.left_to_parent:
            self.distrust(key)

    def current(self, key: str) -> bool:
        """Whether the tier's entry, if it has one, is the latest."""
        return self._stale is not None and key not in self._stale and key not in self.background

    def put(self, key: str, entry: CompactKV) -> None:
        self.background.cancel(key)  # an older write, which would replace this one
        self.tier.put(entry, key)
        self._trust(key)

    def later(self, key: str, entry: CompactKV) -> None:
        """``put`` in the background."""
        # A copy, because the caller may modify the entry's tensors after the call.
        self._trust(key)  # from when it is written: see current
        if self.background.add(key, (_copy(entry), None), entry.nbytes):
            return
        self.distrust(key)
        self._tally.add(background_failures=1)
        logger.warning("%s: put of %s skipped: too much waits for this tier", self.tier, key)

    def promote(self, key: str, entry: CompactKV, reading: Reading) -> None:
        """Copies an entry from a tier below, unless the key is put or deleted meanwhile."""
        if not self.tier.durable:
            self._promote(key, entry, reading)
        elif not self.background.add(key, (_copy(entry), reading), entry.nbytes, replace=False):
            self._tally.add(background_failures=1)
            logger.warning("%s: put of %s skipped: too much waits for this tier", self.tier, key)

    def delete(self, key: str) -> bool:
        self.background.cancel(key)
        deleted = self.tier.delete(key)
        self._trust(key)
        return deleted

    def forget(self, key: str) -> None:
        """Keeps the tier from serving what it has under a key."""
        self.distrust(key)
        if key not in self.background:  # otherwise a stuck write could bring it back
            self._delete_old(key)

    def _delete_old(self, key: str) -> None:
        try:
            self.tier.delete(key)
        except OSError as error:
            logger.warning("%s: deleting the old entry of %s failed: %s", self.tier, key, error)
        else:
            self._trust(key)

    def distrust(self, key: str) -> None:
        """Stops reading a key from the tier until something is put or deleted there."""
        if self._stale is None:
            return
        self._stale.add(key)
        if len(self._stale) > _MOST_STALE:
            self._stale = None
            logger.error(
                "%s: no longer read, because it may have old entries for more than %d keys; open the "
                "store again once it works",
                self.tier,
                _MOST_STALE,
            )

    def _trust(self, key: str) -> None:
        if self._stale is not None:
            self._stale.discard(key)

    def _promote(self, key: str, entry: CompactKV, reading: Reading) -> None:
        with self._keys.promoting(key, reading) as may:
            if may and self._write(key, entry):
                self._trust(key)
                self._tally.add(promotions=1)

    def _write(self, key: str, entry: CompactKV) -> bool:
        try:
            self.tier.put(entry, key)
        except Exception as error:  # there is no caller to raise it to
            self._tally.add(background_failures=1)
            logger.warning(
                "%s: put of %s, which another tier has, failed: %s", self.tier, key, error
            )
            return False
        return True

    def _do(self, jobs: list[tuple[str, tuple[CompactKV, Reading | None]]]) -> None:
        for key, (entry, reading) in jobs:
            if reading is not None:
                self._promote(key, entry, reading)
            elif not self._write(key, entry):
                self.distrust(key)
                self._delete_old(key)


def _copy(entry: CompactKV) -> CompactKV:
    """A copy on the CPU that shares no memory with the entry."""
    host = entry.to("cpu")
    if host is not entry:
        return host
    scales = None if entry.scales is None else entry.scales.clone()
    return replace(entry, kv=entry.kv.clone(), scales=scales, positions=entry.positions.clone())
