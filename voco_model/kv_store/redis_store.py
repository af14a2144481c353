"""``RedisStore``: entries in a Redis server that many machines share."""

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
from voco_model.kv_store.base import StoreUnavailable, key_of
from voco_model.kv_store.bounded import Deadline
from voco_model.kv_store.format import COMPACT, EntryError, check_key, decode, encode, is_key
from voco_model.kv_store.remote import RemoteStore, check_positive, reason_of

QUARANTINE = "voco-kv:quarantine:"
MAX_VALUE_BYTES = 512 * 2**20  # the limit for a string in Redis
_BATCH_BYTES = 64 * 2**20  # of replies that the server has to buffer at a time
_BATCH_KEYS = 1000


class RedisStore(RemoteStore):
    """A store in Redis: one string an entry, the bytes of a ``KVStore``'s file with a shorter header.

    Calls end in time and back off after failures, as described in ``RemoteStore``. Their time includes
    connecting, the name lookup and a server that answers byte by byte.

    ``put`` returns once the server has acknowledged the entry. How long the server keeps it is up to
    ``ttl``, its persistence and its ``maxmemory-policy``: ``allkeys-lru`` makes it a cache; under
    ``noeviction`` puts fail while it is full, and gets still work. There is no ``max_bytes``, because
    one client of many can't limit a server.

    A value that isn't an intact entry of its key is renamed to ``voco-kv:quarantine:<name>:<time>``,
    where it expires, unless a good value has replaced it meanwhile. Another model's entry stays.

    Args:
        server: ``redis://[user:password@]host[:port][/db]``, ``rediss://`` (TLS), ``unix://path?db=0``,
            or a ``redis.Redis``, whose address and credentials are then used.
        ttl: seconds for which an entry is kept after its last put; None for as long as the server likes.
        fingerprint: of the model whose entries are stored and served; None accepts any.
        prefix: of the names, ``<prefix><key>``. The number is the version of the entry's format.
        timeout: seconds for a call, besides what its bytes take.
        min_bandwidth: bytes a second, as a number or text such as "50MB"; a slower transfer counts as
            stalled.
        connections: calls at a time, each with a connection of its own.
        back_off: seconds to stay away, after the first failure and at most.
        quarantine_ttl: seconds for which a bad value is kept.
        clock: monotonic seconds, for the back-off.

    Raises:
        ImportError: redis-py isn't installed.
        ValueError, TypeError: invalid arguments.
    """

    def __init__(
        self,
        server: Any,
        *,
        ttl: float | None = None,
        fingerprint: str | None = None,
        prefix: str = "voco-kv:1:",
        timeout: float = 0.25,
        min_bandwidth: float | str = 50e6,
        connections: int = 8,
        back_off: tuple[float, float] = (1.0, 30.0),
        quarantine_ttl: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_positive(ttl=ttl, quarantine_ttl=quarantine_ttl)
        if QUARANTINE.startswith(prefix):
            raise ValueError(
                f"expected a prefix that {QUARANTINE!r} doesn't start with, got {prefix!r}"
            )
        super().__init__(
            fingerprint=fingerprint,
            timeout=timeout,
            min_bandwidth=min_bandwidth,
            connections=connections,
            back_off=back_off,
            clock=clock,
            name="voco-kv-redis",
        )
        self._redis = _import_redis()
        self._connection_class, self._connection_options = self._address(server)
        self._connection_options.update(
            # A call ends at its deadline; these free its worker if all else fails.
            socket_timeout=timeout + MAX_VALUE_BYTES / self._min_bandwidth,
            socket_connect_timeout=timeout,
            # RemoteStore decides whether and when to try again.
            retry=None,
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            protocol=2,  # no push messages among the replies
            socket_read_size=2**18,
        )
        self._ttl = ttl
        self._prefix = prefix
        self._quarantine_ttl = quarantine_ttl
        self._free: deque = deque()  # idle connections
        try:
            self._free.append(self._connection_class(**self._connection_options))
        except TypeError as error:
            raise ValueError(
                f"expected options that redis-py accepts, got others: {error}"
            ) from None

    def _address(self, server: Any) -> tuple[type, dict[str, Any]]:
        """The class of connections, and their arguments, which contain passwords: never print them."""
        redis = self._redis
        if isinstance(server, redis.Redis):
            pool = server.connection_pool
        elif isinstance(server, str):
            try:
                pool = redis.ConnectionPool.from_url(server)
            except ValueError:  # its message may quote a part of the password as a port
                raise ValueError(
                    "expected redis://[user:password@]host[:port][/db], rediss:// or unix://path, got "
                    "another URL; percent-encode special characters in a password"
                ) from None
        else:
            raise TypeError(f"expected a URL or a redis.Redis, got {type(server).__name__}")
        return pool.connection_class, dict(pool.connection_kwargs)

    def __repr__(self) -> str:
        return f"RedisStore({self.address!r}, prefix={self._prefix!r})"

    @property
    def address(self) -> str:
        """The server's URL, without credentials."""
        options = self._connection_options
        db = options.get("db") or 0
        if "path" in options:
            return f"unix://{options['path']}?db={db}"
        scheme = (
            "rediss" if issubclass(self._connection_class, self._redis.SSLConnection) else "redis"
        )
        return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{db}"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        """As ``Store.put``; an entry above 512 MiB, the limit of Redis, raises ValueError too."""
        key = key_of(entry, key, self.fingerprint)
        parts = encode(entry, key, COMPACT)
        size = sum(map(len, parts))
        if size > MAX_VALUE_BYTES:
            raise ValueError(
                f"expected an entry of up to {MAX_VALUE_BYTES} bytes, which is Redis' limit, got "
                f"{size}; quantize it, or keep it on disk or in an object store"
            )

        def put(connection, deadline: Deadline) -> Exception | None:
            deadline.extend(size / self._min_bandwidth)
            connection.send_packed_command(self._set_command(key, parts, size))
            try:
                connection.read_response(disable_decoding=True)
            except self._redis.ResponseError as error:  # a healthy server that refuses
                return error
            return None

        with self._counted_put(key, size):
            refusal = self._run(put)
            if refusal is not None:
                raise StoreUnavailable(f"{self} refused {size} bytes: {refusal}")

    def get(self, key: str) -> CompactKV | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Iterable[str]) -> list[CompactKV | None]:
        """As ``Store.get_many``, over one connection, in batches of up to 64 MB. If time runs out, the
        entries that have arrived are served."""
        keys = list(keys)
        wanted = {key: self._name(key) for key in keys}
        values: dict[str, Any] = {}
        reason = None
        try:
            self._run(lambda *call: self._fetch_many(*call, list(wanted.values()), values))
        except StoreUnavailable as error:
            reason = reason_of(error)
        arrived = dict(values)  # a call that was cut off may still be adding to it
        for key in keys:
            if wanted[key] not in arrived:
                self._tally.add(reason)
        entries = {key: self._served(key, arrived.pop(name, None)) for key, name in wanted.items()}
        found = [entries[key] for key in keys]
        hits = sum(entry is not None for entry in found)
        self._tally.add(hits=hits, misses=len(keys) - hits)
        return found

    def __iter__(self) -> Iterator[str]:
        """As ``Store.__iter__``, page by page with SCAN.

        Raises:
            StoreUnavailable: before the end.
        """
        seen = set()
        for keys in self._pages():
            for key in keys:
                if key not in seen:  # SCAN may return one twice
                    seen.add(key)
                    yield key

    def __len__(self) -> int:
        """The number of keys, by SCAN, which reads all names in the database.

        Raises:
            StoreUnavailable: it takes longer than ``40 * timeout`` seconds.
        """
        deadline = Deadline(40 * self._timeout)
        counted: set[str] = set()
        for keys in self._pages():
            counted.update(keys)
            if deadline.left() < 0:
                raise StoreUnavailable(
                    f"{self}: counting keys took longer than {deadline.seconds:.3g} s and reached "
                    f"{len(counted)}; iterate over the store instead, which has no time limit"
                )
        return len(counted)

    def close(self) -> None:
        super().close()
        while True:
            try:
                self._free.pop().disconnect()
            except IndexError:
                return

    def _pages(self) -> Iterator[list[str]]:
        """The keys that SCAN finds, one call a page; a page may be empty."""
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + "*"
        cursor = b"0"
        while True:
            page = ("SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH_KEYS)
            cursor, names = self._run(lambda connection, _, page=page: self._ask(connection, *page))
            keys = (name.decode("utf-8", "replace").removeprefix(self._prefix) for name in names)
            yield [key for key in keys if is_key(key)]  # others aren't ours
            if cursor == b"0":
                return

    def _name(self, key: Any) -> str:
        return self._prefix + check_key(key)

    def _set_command(self, key: str, parts: list, size: int) -> list:
        """``SET name value [PX ms]`` as sent over the wire, without a copy of the value."""
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

    def _fetch(self, connection, deadline: Deadline, key: str) -> Any:
        values: dict[str, Any] = {}
        self._fetch_many(connection, deadline, [self._name(key)], values)
        return values[self._name(key)]

    def _fetch_many(self, connection, deadline: Deadline, names: list[str], values: dict) -> None:
        """Puts the values of ``names`` into ``values``: bytes, None if there is nothing, or a WRONGTYPE
        error."""
        for at in range(0, len(names), _BATCH_KEYS):
            some = names[at : at + _BATCH_KEYS]
            # The sizes first: they determine how long this may take, and how much to ask for at a time.
            # In a request of their own, since Redis copies a large value before it answers at all.
            self._send(connection, [("STRLEN", name) for name in some])
            sizes = [self._receive(connection) for _ in some]
            for batch, size in _batches(some, sizes):
                deadline.extend(size / self._min_bandwidth)
                self._send(connection, [("GET", name) for name in batch])
                for name in batch:
                    values[name] = self._receive(connection)

    def _exists(self, connection, _: Deadline, key: str) -> bool:
        return bool(self._ask(connection, "EXISTS", self._name(key)))

    def _remove(self, connection, _: Deadline, key: str) -> bool:
        return bool(self._ask(connection, "DEL", self._name(key)))

    def _set_aside(self, connection, deadline: Deadline, key: str) -> tuple[CompactKV | None, str]:
        name = self._name(key)
        aside = f"{QUARANTINE}{name}:{time.time_ns()}"
        # After WATCH, EXEC does nothing if the value has been written since.
        self._ask(connection, "WATCH", name)
        value = self._fetch(connection, deadline, key)
        try:
            entry = None if value is None else self._decode(key, value)
        except EntryError:
            self._ask(connection, "MULTI")
            self._ask(connection, "RENAME", name, aside)
            self._ask(connection, "PEXPIRE", aside, _milliseconds(self._quarantine_ttl))
            done = self._ask(connection, "EXEC")
            return (
                None,
                f"it was moved to {aside}" if done is not None else "it was replaced meanwhile",
            )
        self._ask(connection, "UNWATCH")
        return entry, "it was removed meanwhile" if entry is None else "a good one has replaced it"

    def _ask(self, connection, *command):
        connection.send_command(*command)
        return connection.read_response(disable_decoding=True)

    def _send(self, connection, commands: list[tuple]) -> None:
        connection.send_packed_command(connection.pack_commands(commands))

    def _receive(self, connection):
        """A reply. WRONGTYPE is returned, since it concerns one name and not the server."""
        try:
            return connection.read_response(disable_decoding=True)
        except self._redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return error

    def _decode(self, key: str, value: Any) -> CompactKV:
        if isinstance(value, Exception):
            raise EntryError("foreign", f"expected a string, got another type ({value})")
        return decode(value, key=key, alignment=COMPACT)

    def _bind(self, operation: Callable[[Any, Deadline], Any], deadline: Deadline):
        lease = _Lease(self._connection_options.get("redis_connect_func"))

        def call() -> Any:
            try:
                return self._with_connection(operation, deadline, lease)
            except self._redis.RedisError as error:
                raise OSError(str(error)) from error

        return call, lease.cut

    def _with_connection(self, operation, deadline: Deadline, lease: _Lease) -> Any:
        while True:
            connection, used = self._connection()
            lease.take(connection)
            try:
                connection.connect()  # unless it is connected already
                result = operation(connection, deadline)
            except BaseException as error:
                was_cut = lease.give_back()
                connection.disconnect()
                # The server may have restarted since this connection was last used. All operations can
                # safely be done twice.
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
        """An idle or new connection, and whether it was used before."""
        while self._free:
            try:
                connection = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if connection.pid == os.getpid():
                return connection, True
            connection.disconnect()  # inherited through a fork
        return self._connection_class(**self._connection_options), False


class _Lease:
    """One call's use of a connection, which the caller can cut off when it stops waiting."""

    def __init__(self, greet: Callable[[Any], None] | None = None) -> None:
        self._greet = greet  # replaces redis-py's own
        self._lock = threading.Lock()
        self._connection: Any = None
        self._was_cut = False

    def take(self, connection: Any) -> None:
        """Raises TimeoutError if the call was cut off already."""
        with self._lock:
            self._check()
            self._connection = connection
            connection.redis_connect_func = self._connected

    def _connected(self, connection: Any) -> None:
        # Between connecting and greeting. Before this, cut() may have found no socket to shut down.
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
            raise TimeoutError("the call was given up before its connection was made")

    def give_back(self) -> bool:
        """Ends the lease: the connection can't be cut off any more. Returns whether it was."""
        with self._lock:
            self._connection = None
            return self._was_cut

    def cut(self) -> None:
        with self._lock:
            self._was_cut = True
            # Shut down, not closed: the worker may still be reading from this descriptor, which after a
            # close could belong to another file. redis-py has no public name for the socket.
            sock = getattr(self._connection, "_sock", None)
            if sock is not None:
                try:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # for TLS, without close_notify
                except OSError:
                    pass


def _batches(names: list[str], sizes: list) -> Iterator[tuple[list[str], int]]:
    """Groups of names and the total size of their values, up to ``_BATCH_BYTES`` or one name each."""
    batch, total = [], 0
    for name, size in zip(names, sizes, strict=True):
        size = size if isinstance(size, int) else 0
        if batch and total + size > _BATCH_BYTES:
            yield batch, total
            batch, total = [], 0
        batch.append(name)
        total += min(size, MAX_VALUE_BYTES)
    yield batch, total


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(round(1000 * seconds), 1)


def _import_redis():
    try:
        import redis
    except ImportError as error:
        raise ImportError(
            "expected redis-py, which RedisStore needs, got none; pip install -e '.[redis]'"
        ) from error
    return redis
