"""``RedisStore``: entries in a Redis that many machines share, which may be down, slow or full."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    VerifyReport,
    key_of,
    logger,
    may_serve,
)
from voco_model.kv_store.bounded import Breaker, BusyError, Deadline, Workers
from voco_model.kv_store.format import COMPACT, EntryError, check_key, decode, encode

QUARANTINE = "voco-kv:quarantine:"
MAX_VALUE_BYTES = 512 * 2**20  # of one string in Redis
_BATCH_BYTES = 64 * 2**20  # of replies that the server has to hold ready at a time
_BATCH_KEYS = 1000


class RedisStore(Store):
    """A store in Redis: one string an entry, the bytes of ``KVStore``'s file with a shorter header.

    Whatever is wrong with the server, a call ends in time: within ``timeout`` seconds and what its bytes
    take at ``min_bandwidth``; connecting, the name lookup and a server that dribbles are included. After
    a failure nobody asks the server for ``back_off[0]`` seconds; then one call probes, and the time
    doubles up to ``back_off[1]`` with each probe that fails. Meanwhile ``get`` is a miss and every other
    call raises StoreUnavailable (an OSError), at once.

    ``put`` returns when the server has acknowledged the entry. What the server keeps after that is its
    own business: ``ttl``, its ``maxmemory-policy`` (``allkeys-lru`` makes a cache of it; under
    ``noeviction`` puts fail while it is full, and gets go on) and its persistence. There is no
    ``max_bytes`` here: one client of many can't bound a server.

    A value that isn't an intact entry of its key is a miss, counted under its reason, and renamed to
    ``voco-kv:quarantine:<name>:<time>``, where it expires; never one that a good value has replaced
    meanwhile. Another model's entry is a miss, too, and stays. ``stats`` counts two more reasons:
    "unavailable", where the server was asked in vain, and "backing off", where it wasn't asked.

    Args:
        server: ``redis://[user:password@]host[:port][/db]``, ``rediss://`` (TLS), ``unix://path?db=0``,
            or a ``redis.Redis``, whose address and credentials are then used.
        ttl: seconds that an entry is kept after its last put; None: for as long as the server keeps it.
        fingerprint: of the model whose entries are kept and served; None: of any.
        prefix: of the names, ``<prefix><key>``. The number is the version of the entry's format.
        timeout: seconds for one call, besides what its bytes take.
        min_bandwidth: bytes a second; a transfer that is slower counts as stalled.
        connections: calls at a time, each with a connection of its own.
        back_off: seconds to stay away, after the first failure and at most.
        quarantine_ttl: seconds that a bad value is kept.
        clock: monotonic seconds, for the back-off.

    Raises:
        ImportError: redis-py isn't installed.
        ValueError, TypeError: arguments that don't fit.
    """

    def __init__(
        self,
        server: Any,
        *,
        ttl: float | None = None,
        fingerprint: str | None = None,
        prefix: str = "voco-kv:1:",
        timeout: float = 0.25,
        min_bandwidth: float = 50e6,
        connections: int = 8,
        back_off: tuple[float, float] = (1.0, 30.0),
        quarantine_ttl: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        positive = {
            "ttl": ttl,
            "timeout": timeout,
            "min_bandwidth": min_bandwidth,
            "quarantine_ttl": quarantine_ttl,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"expected {name} above 0, got {value!r}")
        if QUARANTINE.startswith(prefix):
            raise ValueError(
                f"expected a prefix that {QUARANTINE!r} doesn't begin with, got {prefix!r}"
            )
        self._redis = _import_redis()
        self._connection_class, self._connection_options = self._address(server)
        self._connection_options.update(
            # The deadline of a call is what bounds it; these free its worker, should all else fail.
            socket_timeout=timeout + MAX_VALUE_BYTES / min_bandwidth,
            socket_connect_timeout=timeout,
            # Whether and when to try again is decided here.
            retry=None,
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            protocol=2,  # replies, and no other messages between them
            socket_read_size=2**18,
        )
        self._ttl = ttl
        self.fingerprint = fingerprint
        self._prefix = prefix
        self._timeout = timeout
        self._min_bandwidth = min_bandwidth
        self._quarantine_ttl = quarantine_ttl
        self._breaker = Breaker(*back_off, clock=clock)
        self._workers = Workers(connections, "voco-kv-redis")
        self._free: deque = deque()  # connections that nobody uses
        self._closed = False
        self._tally = Tally(StoreStats())
        try:
            self._free.append(self._connection_class(**self._connection_options))
        except TypeError as error:
            raise ValueError(f"expected options that redis-py knows, got others: {error}") from None

    def _address(self, server: Any) -> tuple[type, dict[str, Any]]:
        """The class of connections and their arguments, which nothing may print: passwords are there."""
        redis = self._redis
        if isinstance(server, redis.Redis):
            pool = server.connection_pool
        elif isinstance(server, str):
            try:
                pool = redis.ConnectionPool.from_url(server)
            except ValueError:  # which may cite a part of the password as a port
                raise ValueError(
                    "expected redis://[user:password@]host[:port][/db], rediss:// or unix://path, got "
                    "what can't be read as one; percent-encode special characters of a password"
                ) from None
        else:
            raise TypeError(f"expected a URL or a redis.Redis, got {type(server).__name__}")
        return pool.connection_class, dict(pool.connection_kwargs)

    def __repr__(self) -> str:
        return f"RedisStore({self.address!r}, prefix={self._prefix!r})"

    @property
    def address(self) -> str:
        """Where the server is, without credentials."""
        options = self._connection_options
        db = options.get("db") or 0
        if "path" in options:
            return f"unix://{options['path']}?db={db}"
        scheme = (
            "rediss" if issubclass(self._connection_class, self._redis.SSLConnection) else "redis"
        )
        return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{db}"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """As ``Store.put``; an entry of more than 512 MiB, Redis' limit, is a ValueError too."""
        key = key_of(entry, key, self.fingerprint)
        parts = encode(entry, key, COMPACT)
        size = sum(map(len, parts))
        if size > MAX_VALUE_BYTES:
            raise ValueError(
                f"expected an entry of up to {MAX_VALUE_BYTES} bytes, which is Redis' limit, got "
                f"{size}; quantize it, or keep it on disk or in an object store"
            )

        def put(connection, deadline):
            deadline.extend(size / self._min_bandwidth)
            connection.send_packed_command(self._set_command(key, parts, size))
            try:
                return connection.read_response(disable_decoding=True)
            except self._redis.ResponseError as error:  # the server is well, and says no
                return error

        try:
            reply = self._run(put)
            if isinstance(reply, Exception):
                raise StoreUnavailable(f"expected {self} to take {size} bytes, it says: {reply}")
        except StoreUnavailable as error:
            self._tally.add(put_failures=1)
            logger.warning("put of %s (%d bytes) failed: %s", key, size, error)
            raise
        self._tally.add(puts=1, bytes_written=size)

    def get(self, key: str) -> CompactKV | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """As ``Store.get_many``: with one connection, in batches of up to 64 MB. Where the time is over
        before all have arrived, those that have are served."""
        keys = list(keys)
        wanted = {key: self._name(key) for key in keys}
        values: dict[str, Any] = {}
        reason = None
        try:
            self._run(lambda *call: self._fetch(*call, list(wanted.values()), values))
        except StoreUnavailable as error:
            reason = "backing off" if isinstance(error, _BackingOffError) else "unavailable"
        arrived = dict(values)  # a call that was cut off may still be at it
        for key in keys:
            if wanted[key] not in arrived:
                self._tally.add(reason)
        entries = {key: self._open(key, arrived.pop(name, None)) for key, name in wanted.items()}
        found = [entries[key] for key in keys]
        hits = sum(entry is not None for entry in found)
        self._tally.add(hits=hits, misses=len(keys) - hits)
        return found

    def delete(self, key: str) -> bool:
        """As ``Store.delete``. Raises StoreUnavailable where nobody can say."""
        name = self._name(key)
        deleted = bool(self._run(lambda connection, _: self._ask(connection, "DEL", name)))
        self._tally.add(deletes=deleted)
        return deleted

    def stats(self) -> StoreStats:
        """What this handle did. How much the server holds is known to the server (``len`` counts)."""
        return self._tally.read()

    def verify(self) -> VerifyReport:
        """Reads every entry; values that may not be served are quarantined.

        Raises:
            StoreUnavailable: before all were read.
        """
        report = VerifyReport()
        for key in self:
            values: dict[str, Any] = {}
            self._run(
                lambda *call, key=key, values=values: self._fetch(*call, [self._name(key)], values)
            )
            value = values[self._name(key)]
            if value is None:
                continue
            try:
                self._decode(key, value)
            except EntryError as error:
                report.bad[key] = str(error)
                self._quarantine(key, error)
            else:
                report.entries += 1
                report.bytes += len(value)
        return report

    def __contains__(self, key: object) -> bool:
        """Whether the server says that there is something; False where it can't be asked."""
        name = self._name(key)
        try:
            return bool(self._run(lambda connection, _: self._ask(connection, "EXISTS", name)))
        except StoreUnavailable:
            return False

    def __iter__(self) -> Iterator[str]:
        """As ``Store.__iter__``, page by page with SCAN. Raises StoreUnavailable where it ends early."""
        seen = set()
        for keys in self._pages():
            for key in keys:
                if key not in seen:  # SCAN may say one twice
                    seen.add(key)
                    yield key

    def __len__(self) -> int:
        """Keys counted with SCAN, which passes all names of the database, in ``40 * timeout`` seconds.

        Raises:
            StoreUnavailable: it would take longer.
        """
        deadline = Deadline(40 * self._timeout)
        counted: set[str] = set()
        for keys in self._pages():
            counted.update(keys)
            if deadline.left() < 0:
                raise StoreUnavailable(
                    f"expected {self} to be counted in {deadline.seconds:.3g} s, got as far as "
                    f"{len(counted)}; iterate over the store, which takes its time"
                )
        return len(counted)

    def close(self) -> None:
        self._closed = True
        while True:
            try:
                self._free.pop().disconnect()
            except IndexError:
                return

    def _pages(self) -> Iterator[list[str]]:
        """The keys that SCAN finds, a call each page; there may be none on a page."""
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + "*"
        cursor = b"0"
        while True:
            page = ("SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH_KEYS)
            cursor, names = self._run(lambda connection, _, page=page: self._ask(connection, *page))
            keys = (name.decode("utf-8", "replace").removeprefix(self._prefix) for name in names)
            yield [key for key in keys if _is_key(key)]  # others are somebody else's
            if cursor == b"0":
                return

    def _name(self, key: Any) -> str:
        return self._prefix + check_key(key)

    def _set_command(self, key: str, parts: list, size: int) -> list:
        """``SET name value [PX ms]`` as it goes over the wire: the parts of the value aren't copied."""
        name = self._name(key).encode()
        expiry = []
        if self._ttl is not None:
            expiry = [b"PX", _milliseconds(self._ttl)]
        head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (
            3 + len(expiry),
            len(name),
            name,
            size,
        )
        tail = b"".join(b"\r\n$%d\r\n%s" % (len(word), word) for word in expiry) + b"\r\n"
        return [head, *parts, tail]

    def _fetch(self, connection, deadline: Deadline, names: list[str], values: dict) -> None:
        """Puts what is under ``names`` into ``values``: bytes, None for nothing, or WRONGTYPE."""
        for at in range(0, len(names), _BATCH_KEYS):
            some = names[at : at + _BATCH_KEYS]
            # The sizes come first: they say how long it may take, and how much to ask for at a time.
            # They are asked for alone, since Redis sends no answer before it has copied a large value.
            self._send(connection, [("STRLEN", name) for name in some])
            sizes = [self._receive(connection) for _ in some]
            for batch, size in _batches(some, sizes):
                deadline.extend(size / self._min_bandwidth)
                self._send(connection, [("GET", name) for name in batch])
                for name in batch:
                    values[name] = self._receive(connection)

    def _ask(self, connection, *command):
        connection.send_command(*command)
        return connection.read_response(disable_decoding=True)

    def _send(self, connection, commands: list[tuple]) -> None:
        connection.send_packed_command(connection.pack_commands(commands))

    def _receive(self, connection):
        """A reply; WRONGTYPE as a value: it says something about one name, not about the server."""
        try:
            return connection.read_response(disable_decoding=True)
        except self._redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return error

    def _decode(self, key: str, value: Any) -> CompactKV:
        if isinstance(value, Exception):
            raise EntryError("foreign", f"expected a string, Redis says {value}")
        return decode(value, key=key, alignment=COMPACT)

    def _open(self, key: str, value: Any) -> CompactKV | None:
        """The entry in a value, if it may be served."""
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
        """Puts a bad value aside; or returns the good entry that has replaced it meanwhile."""
        name = self._name(key)
        aside = f"{QUARANTINE}{name}:{time.time_ns()}"

        def quarantine(connection, deadline):
            # After WATCH, EXEC does nothing if anybody writes the value from here on.
            self._ask(connection, "WATCH", name)
            values: dict[str, Any] = {}
            self._fetch(connection, deadline, [name], values)
            entry = None
            try:
                if values[name] is not None:
                    entry = self._decode(key, values[name])
            except EntryError:
                self._ask(connection, "MULTI")
                self._ask(connection, "RENAME", name, aside)
                self._ask(connection, "PEXPIRE", aside, _milliseconds(self._quarantine_ttl))
                done = self._ask(connection, "EXEC")
                return None, "replaced meanwhile" if done is None else f"now {aside}"
            self._ask(connection, "UNWATCH")
            return entry, "gone by now" if entry is None else "replaced by a good one"

        try:
            entry, fate = self._run(quarantine)
        except StoreUnavailable as unavailable:
            entry, fate = None, f"left where it is ({unavailable})"
        logger.warning("%s: value of %s not served, %s; it is %s", self, key, error, fate)
        return entry

    def _run(self, operation: Callable[[Any, Deadline], Any]) -> Any:
        """``operation(connection, deadline)``, or StoreUnavailable in time."""
        if self._closed:
            raise ValueError("expected an open store, got a closed one")
        if not self._breaker.allow():
            raise _BackingOffError(
                f"{self} has failed; it is asked again in {self._breaker.left():.3g} s"
            )
        deadline = Deadline(self._timeout)
        lease = _Lease(self._connection_options.get("redis_connect_func"))
        try:
            result = self._workers.run(
                lambda: self._with_connection(operation, deadline, lease), deadline, lease.cut
            )
        except BusyError as error:
            self._breaker.asked_nothing()
            logger.warning("%s: %s", self, error)
            raise StoreUnavailable(f"{self}: {error}") from error
        except (self._redis.RedisError, OSError) as error:
            seconds = self._breaker.failed()
            logger.warning("%s: %s; staying away for %.3g s", self, error, seconds)
            raise StoreUnavailable(f"{self}: {error}") from error
        except BaseException:  # an interrupt, say; the next one finds out
            self._breaker.asked_nothing()
            raise
        self._breaker.succeeded()
        return result

    def _with_connection(self, operation, deadline: Deadline, lease: _Lease) -> Any:
        while True:
            connection, used = self._connection()
            lease.take(connection)
            try:
                connection.connect()  # where it isn't
                result = operation(connection, deadline)
            except BaseException as error:
                was_cut = lease.give_back()
                connection.disconnect()
                # The server may have restarted since this connection was last used. Nothing that is
                # done here does harm when it is done twice.
                if used and not was_cut and isinstance(error, self._redis.ConnectionError):
                    continue
                raise
            if lease.give_back():
                connection.disconnect()
            else:
                self._free.append(connection)
            if self._closed:
                self.close()
            return result

    def _connection(self) -> tuple[Any, bool]:
        """A connection that nobody else uses, and whether somebody has used it before."""
        while self._free:
            try:
                connection = self._free.pop()
            except IndexError:  # somebody was faster
                break
            if connection.pid == os.getpid():
                return connection, True
            connection.disconnect()  # the parent's, from before a fork
        return self._connection_class(**self._connection_options), False


class _BackingOffError(StoreUnavailable):
    """The server wasn't asked."""


class _Lease:
    """The connection of one call, which whoever no longer waits for the call cuts off."""

    def __init__(self, greet: Callable[[Any], None] | None = None) -> None:
        self._greet = greet  # in place of redis-py's own
        self._lock = threading.Lock()
        self._connection: Any = None
        self._was_cut = False

    def take(self, connection: Any) -> None:
        """Raises TimeoutError if it was cut already."""
        with self._lock:
            self._check()
            self._connection = connection
            connection.redis_connect_func = self._connected

    def _connected(self, connection: Any) -> None:
        # Between connecting and greeting. Any earlier, cut() found no socket that it could shut.
        try:
            with self._lock:
                self._check()
        except TimeoutError:
            connection.disconnect()
            raise
        if self._greet is None:
            connection.on_connect()
        else:
            self._greet(connection)

    def _check(self) -> None:
        if self._was_cut:
            raise TimeoutError("expected a connection while somebody waits for it, got one later")

    def give_back(self) -> bool:
        """Nobody can cut the connection off from here on. Returns whether somebody has."""
        with self._lock:
            self._connection = None
            return self._was_cut

    def cut(self) -> None:
        with self._lock:
            self._was_cut = True
            # Shut and not closed, which is up to who uses it: a number that is closed here may be
            # another file's by the time it is read there. redis-py has no public name for the socket.
            sock = getattr(self._connection, "_sock", None)
            if sock is not None:
                try:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS: without its goodbye
                except OSError:
                    pass


def _batches(names: list[str], sizes: list) -> Iterator[tuple[list[str], int]]:
    """Runs of names with the bytes of their values, up to ``_BATCH_BYTES`` or one name."""
    batch, total = [], 0
    for name, size in zip(names, sizes, strict=True):
        size = size if isinstance(size, int) else 0
        if batch and total + size > _BATCH_BYTES:
            yield batch, total
            batch, total = [], 0
        batch.append(name)
        total += min(size, MAX_VALUE_BYTES)
    yield batch, total


def _is_key(key: str) -> bool:
    try:
        return bool(check_key(key))
    except ValueError:
        return False


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(round(1000 * seconds), 1)


def _import_redis():
    try:
        import redis
    except ImportError as error:
        raise ImportError(
            "expected redis-py, which RedisStore speaks through, got none; "
            "pip install -e '.[redis]'"
        ) from error
    return redis
