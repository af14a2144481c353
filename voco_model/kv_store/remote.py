"""``RemoteStore``: the common part of stores on a server, which may be down, slow or full."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    VerifyReport,
    logger,
    may_serve,
)
from voco_model.kv_store.bounded import Breaker, BusyError, Deadline, Workers
from voco_model.kv_store.format import EntryError, check_key
from voco_model.kv_store.sizes import byte_count


class BackingOff(StoreUnavailable):  # noqa: N818
    """The server wasn't asked, because it failed a short while ago."""


class RemoteStore(Store):
    """A store on a server: calls end in time, and entries that aren't intact are set aside.

    Whatever happens on the other side, a call ends within ``timeout`` seconds plus the time that its
    bytes take at ``min_bandwidth``. After a failure no call is made for ``back_off[0]`` seconds; then
    one call probes, and the pause doubles with each probe that fails, up to ``back_off[1]``. Until then
    ``get`` is a miss, and every other method raises StoreUnavailable (an OSError) at once.

    ``stats`` counts two more reasons for misses: "unavailable", if the server was asked in vain, and
    "backing off", if it wasn't asked. The number of entries is known only to the server; ``len`` counts.

    A subclass implements ``put``, ``__iter__`` and five operations that run in a worker thread, with the
    arguments that its ``_bind`` gives them, here ``*call``, and the key:

    * ``_fetch(*call, key)``: the stored value; None if there is none.
    * ``_exists(*call, key)`` and ``_remove(*call, key)``: whether there is or was one.
    * ``_set_aside(*call, key)``: moves a bad value out of the way, unless a good one has replaced it.
      Returns that one's entry or None, and what was done, for the log.

    Args:
        fingerprint: of the model whose entries are stored and served; None accepts any.
        timeout: seconds for a call, besides what its bytes take.
        min_bandwidth: bytes a second, as a number or text such as "50MB"; a slower transfer counts as
            stalled.
        connections: calls at a time.
        back_off: seconds to stay away, after the first failure and at most.
        clock: monotonic seconds, for the back-off.
        name: of the worker threads.

    Raises:
        ValueError, TypeError: invalid arguments.
    """

    def __init__(
        self,
        *,
        fingerprint: str | None,
        timeout: float,
        min_bandwidth: float | str,
        connections: int,
        back_off: tuple[float, float],
        clock: Callable[[], float] = time.monotonic,
        name: str,
    ) -> None:
        if isinstance(min_bandwidth, str):
            min_bandwidth = byte_count("min_bandwidth", min_bandwidth, at_least=1)
        check_positive(timeout=timeout, min_bandwidth=min_bandwidth)
        self.fingerprint = fingerprint
        self._timeout = timeout
        self._min_bandwidth = min_bandwidth
        self._breaker = Breaker(*back_off, clock=clock)
        self._workers = Workers(connections, name)
        self._tally = Tally(StoreStats())
        self._closed = False

    # --- for subclasses to implement

    @abstractmethod
    def _bind(
        self, operation: Callable[..., Any], deadline: Deadline
    ) -> tuple[Callable[[], Any], Callable[[], None] | None]:
        """The call that a worker makes for an operation, and a way to cut it off, if there is one. The
        call raises OSError for whatever goes wrong on the other side."""

    @abstractmethod
    def _fetch(self, *call: Any) -> Any: ...

    @abstractmethod
    def _exists(self, *call: Any) -> bool: ...

    @abstractmethod
    def _remove(self, *call: Any) -> bool: ...

    @abstractmethod
    def _set_aside(self, *call: Any) -> tuple[CompactKV | None, str]: ...

    @abstractmethod
    def _decode(self, key: str, value: Any) -> CompactKV:
        """The entry in a fetched value; EntryError if it isn't an intact one of that key."""

    # --- the interface

    def get(self, key: str) -> CompactKV | None:
        check_key(key)
        try:
            value = self._run(lambda *call: self._fetch(*call, key))
        except StoreUnavailable as error:
            self._tally.add(reason_of(error), misses=1)
            return None
        entry = self._served(key, value)
        self._tally.add(hits=int(entry is not None), misses=int(entry is None))
        return entry

    def delete(self, key: str) -> bool:
        """As ``Store.delete``.

        Raises:
            StoreUnavailable: the server can't be asked.
        """
        check_key(key)
        deleted = self._run(lambda *call: self._remove(*call, key))
        self._tally.add(deletes=deleted)
        return deleted

    def __contains__(self, key: object) -> bool:
        """Whether there is something under a key; False if the server can't be asked."""
        check_key(key)
        try:
            return self._run(lambda *call: self._exists(*call, key))
        except StoreUnavailable:
            return False

    def stats(self) -> StoreStats:
        """What this handle has done."""
        return self._tally.read()

    def verify(self) -> VerifyReport:
        """Reads every entry, and sets aside those that aren't intact.

        Raises:
            StoreUnavailable: before all were read.
        """
        report = VerifyReport()
        for key in self:
            value = self._run(lambda *call, key=key: self._fetch(*call, key))
            if value is None:
                continue
            try:
                self._decode(key, value)
            except EntryError as error:
                report.bad[key] = error.reason
                self._quarantine(key, error)
            else:
                report.entries += 1
                report.bytes += len(value)
        return report

    def close(self) -> None:
        self._closed = True

    # --- shared by the subclasses

    @contextmanager
    def _counted_put(self, key: str, size: int) -> Iterator[None]:
        """Counts what happens in the context as a put of ``size`` bytes, and logs its failure."""
        try:
            yield
        except StoreUnavailable as error:
            self._tally.add(put_failures=1)
            logger.warning("put of %s (%d bytes) failed: %s", key, size, error)
            raise
        self._tally.add(puts=1, bytes_written=size)

    def _served(self, key: str, value: Any) -> CompactKV | None:
        """The entry in a fetched value, if it may be served."""
        if value is None:
            return None
        try:
            entry = self._decode(key, value)
        except EntryError as error:
            self._tally.add(error.reason)
            entry = self._quarantine(key, error)
        if entry is None or not may_serve(self, entry, key, self._tally):
            return None
        self._tally.add(bytes_read=entry.nbytes)
        return entry

    def _quarantine(self, key: str, error: EntryError) -> CompactKV | None:
        """Sets a bad value aside. Returns the good entry that has replaced it meanwhile, if there is
        one."""
        try:
            entry, fate = self._run(lambda *call: self._set_aside(*call, key))
        except StoreUnavailable as unavailable:
            entry, fate = None, f"it was left in place ({unavailable})"
        logger.warning("%s: entry %s is not served: %s; %s", self, key, error, fate)
        return entry

    def _run(self, operation: Callable[..., Any], nbytes: int = 0) -> Any:
        """Runs an operation in a worker, until its deadline.

        Args:
            nbytes: to be transferred, as far as that is known before the call.

        Raises:
            StoreUnavailable: it failed, or wasn't over in time.
        """
        if self._closed:
            raise ValueError("expected an open store, got a closed one; open it again")
        if not self._breaker.allow():
            raise BackingOff(
                f"{self} failed; it will be asked again in {self._breaker.left():.3g} s"
            )
        deadline = Deadline(self._timeout + nbytes / self._min_bandwidth)
        call, cut = self._bind(operation, deadline)
        try:
            result = self._workers.run(call, deadline, cut)
        except BusyError as error:
            self._breaker.asked_nothing()
            logger.warning("%s: %s", self, error)
            raise StoreUnavailable(f"{self}: {error}") from error
        except OSError as error:
            seconds = self._breaker.failed()
            logger.warning("%s: %s; staying away for %.3g s", self, error, seconds)
            raise StoreUnavailable(f"{self}: {error}") from error
        except BaseException:  # an interrupt, for instance: the next call will tell
            self._breaker.asked_nothing()
            raise
        self._breaker.succeeded()
        return result


def reason_of(error: StoreUnavailable) -> str:
    """Why a miss couldn't be looked up, for ``StoreStats.failures``."""
    return "backing off" if isinstance(error, BackingOff) else "unavailable"


def check_positive(**values: float | None) -> None:
    """Raises ValueError for a value that is neither None nor a finite number above 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"expected {name} above 0, got {value!r}")
