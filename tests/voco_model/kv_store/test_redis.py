"""``RedisStore`` with a real server, and with servers that misbehave."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from tests.voco_model.kv_store.conftest import PATIENT, free_port
from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import StoreUnavailable
from voco_model.kv_store.bounded import Breaker, BusyError, Deadline, Workers
from voco_model.kv_store.format import COMPACT, encode
from voco_model.kv_store.redis_store import QUARANTINE, RedisStore

redis = pytest.importorskip("redis")

SHORT = 0.2  # timeout in seconds for a server that won't answer
GENEROUS = 10 * SHORT  # by when it must have given up, on a busy machine


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(redis_server, clock):
    with RedisStore(redis_server.url, timeout=PATIENT, clock=clock) as store:
        yield store


@pytest.fixture
def client(redis_server):
    with redis_server.client() as client:
        yield client


def name_of(number: int) -> str:
    return f"voco-kv:1:{make_key(number)}"


def value_of(entry: CompactKV, key: str | None = None) -> bytes:
    return b"".join(encode(entry, key or entry.key))


# --- a healthy server


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_round_trip(store, dtype):
    entry = make_entry(1, tokens=3, dtype=dtype)
    assert store.get(entry.key) is None and entry.key not in store
    store.put(entry)
    assert_same(store.get(entry.key), entry)
    assert entry.key in store and list(store) == [entry.key] and len(store) == 1
    assert store.delete(entry.key) and not store.delete(entry.key)
    assert store.get(entry.key) is None
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.puts, stats.deletes) == (1, 2, 1, 1)
    assert stats.failures == {}


def test_the_value_is_the_file_with_a_compact_header(store, client):
    entry = make_entry(1)
    store.put(entry)
    assert client.get(name_of(1)) == b"".join(encode(entry, entry.key, COMPACT))


def test_through_a_unix_socket(redis_server):
    with RedisStore(f"unix://{redis_server.socket}?db=3", timeout=PATIENT) as store:
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
        assert (
            repr(store) == f"RedisStore('unix://{redis_server.socket}?db=3', prefix='voco-kv:1:')"
        )


def test_with_a_client_of_the_callers_own(redis_server):
    """Its decode and retry options don't affect the store."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        with RedisStore(client, timeout=PATIENT) as store:
            store.put(make_entry(1))
            assert_same(store.get(make_key(1)), make_entry(1))


def test_hiredis_reads_the_replies(store):
    store.get(make_key(1))
    (connection,) = store._free
    assert type(connection._get_parser()).__name__ == "_HiredisParser"


def test_many_at_once(store, monkeypatch):
    entries = [make_entry(number) for number in range(20)]
    for entry in entries[::2]:
        store.put(entry)
    monkeypatch.setattr(
        "voco_model.kv_store.redis_store._BATCH_BYTES", 3 * len(value_of(entries[0]))
    )
    monkeypatch.setattr("voco_model.kv_store.redis_store._BATCH_KEYS", 8)
    keys = [entry.key for entry in entries]
    got = store.get_many([*keys, keys[0]])
    for entry, found in zip([*entries, entries[0]], got, strict=True):
        if entry in entries[::2]:
            assert_same(found, entry)
        else:
            assert found is None
    assert store.get_many([]) == []
    assert (store.stats().hits, store.stats().misses) == (11, 10)


def test_a_large_entry(store):
    kv = torch.randn(8, 2, 16, 576, 64)  # 38 MB: more than the sockets' buffers hold
    entry = CompactKV(kv, torch.arange(576), 576, key=make_key(1))
    store.put(entry)
    assert torch.equal(store.get(entry.key).kv, kv)


def test_an_entry_beyond_redis_limit_is_refused(store, monkeypatch):
    monkeypatch.setattr("voco_model.kv_store.redis_store.MAX_VALUE_BYTES", 512)
    with pytest.raises(ValueError, match="Redis' limit"):
        store.put(make_entry(1))


def test_iteration_sees_entries_only(store, client):
    for number in range(2500):  # more than one page of SCAN
        client.set(name_of(number), b"")
    client.set("voco-kv:1:not-a-key", b"")
    client.set("another", b"")
    client.set(f"{QUARANTINE}{name_of(1)}:1", b"")
    assert sorted(store) == [make_key(number) for number in range(2500)]


def test_counting_ends_in_time(redis_server, client):
    """However many other names the server has."""
    client.mset({f"another{number}": b"" for number in range(5000)})
    with RedisStore(redis_server.url, timeout=PATIENT) as store:
        assert len(store) == 0
        store._timeout = 1e-9
        with mock.patch.object(
            store, "_run", lambda operation: [b"7", []]
        ):  # as if SCAN never ended
            with pytest.raises(StoreUnavailable, match="counting keys took longer"):
                len(store)


def test_a_prefix_is_a_room_of_its_own(redis_server):
    with (
        RedisStore(redis_server.url, prefix="tenant*:", timeout=PATIENT) as a,
        RedisStore(redis_server.url, prefix="tenantb:", timeout=PATIENT) as b,
    ):
        a.put(make_entry(1))
        b.put(make_entry(2))
        assert list(a) == [make_key(1)] and list(b) == [make_key(2)]
        assert a.get(make_key(2)) is None


def test_entries_expire(redis_server, client):
    with RedisStore(redis_server.url, ttl=1000.5, timeout=PATIENT) as store:
        store.put(make_entry(1))
        assert 990_000 < client.pttl(name_of(1)) <= 1_000_500
        assert_same(store.get(make_key(1)), make_entry(1))
        client.pexpire(name_of(1), 1)
        time.sleep(0.005)
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {}


def test_many_threads(store):
    entries = [make_entry(number, tokens=40) for number in range(10)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                entry = entries[(seed * 3 + step) % 10]
                if step % 3 == 0:
                    store.put(entry)
                elif (got := store.get(entry.key)) is not None:
                    assert_same(got, entry)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store._free) <= 8
    assert store.stats().failures == {}


def test_a_forked_child_has_connections_of_its_own(store):
    store.put(make_entry(1))
    pid = os.fork()
    if pid == 0:
        connection, used = store._connection()
        connection.disconnect()
        got = store.get(make_key(1))
        same = got is not None and torch.equal(got.kv, make_entry(1).kv)
        os._exit(0 if same and not used else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert_same(store.get(make_key(1)), make_entry(1))


def test_a_closed_store_says_so(redis_server):
    store = RedisStore(redis_server.url, timeout=PATIENT)
    store.put(make_entry(1))
    entry = store.get(make_key(1))
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.get(make_key(1))
    assert_same(entry, make_entry(1))


# --- a server that goes down and comes back


def test_restart_without_data(redis_server, store):
    store.put(make_entry(1))
    redis_server.kill()
    redis_server.start()
    assert store.get(make_key(1)) is None
    assert store.stats().failures == {}, "a restart between calls is no failure"
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


def test_restart_with_data(redis_server, store, client):
    store.put(make_entry(1))
    client.save()
    redis_server.kill()
    redis_server.start()
    assert_same(store.get(make_key(1)), make_entry(1))
    (redis_server.folder / "dump.rdb").unlink()


def test_a_server_that_is_down(redis_server, store, clock, caplog):
    store.put(make_entry(1))
    redis_server.kill()
    began = time.monotonic()
    assert store.get(make_key(1)) is None
    assert store.stats().failures == {"unavailable": 1}
    with pytest.raises(StoreUnavailable, match="asked again in 1 s"):
        store.put(make_entry(2))
    assert store.get_many([make_key(1), make_key(2)]) == [None, None]
    for ask in (lambda: store.delete(make_key(1)), lambda: [*iter(store)], lambda: len(store)):
        with pytest.raises(StoreUnavailable):
            ask()
    assert make_key(1) not in store
    assert store.stats().failures == {"unavailable": 1, "backing off": 2}
    assert store.stats().put_failures == 1
    assert time.monotonic() - began < GENEROUS
    assert caplog.text.count("staying away for 1 s") == 1

    clock.now += 1.0
    assert store.get(make_key(1)) is None  # the probe
    assert store.stats().failures == {"unavailable": 2, "backing off": 2}
    assert "staying away for 2 s" in caplog.text

    redis_server.start()
    clock.now += 1.0
    assert store.get(make_key(1)) is None
    assert store.stats().failures["backing off"] == 3
    clock.now += 1.0
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


def test_no_server_is_listening():
    with RedisStore(f"redis://127.0.0.1:{free_port()}", timeout=PATIENT) as store:
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {"unavailable": 1}


def test_a_server_that_loads_its_data(fake_server):
    server = fake_server(
        lambda sock: answer(sock, b"-LOADING Redis is loading the dataset in memory\r\n")
    )
    with RedisStore(server.url, timeout=PATIENT) as store:
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {"unavailable": 1}


# --- a server that stalls


def test_a_stalled_server(redis_server, clock):
    with RedisStore(redis_server.url, timeout=SHORT, clock=clock) as store:
        for _ in range(50):  # the machine may be busy
            try:
                store.put(make_entry(1))
                break
            except StoreUnavailable:
                clock.now += 60
        redis_server.stall()
        began = time.monotonic()
        assert store.get(make_key(1)) is None
        waited = time.monotonic() - began
        assert SHORT <= waited < GENEROUS
        began = time.monotonic()
        assert store.get(make_key(1)) is None
        with pytest.raises(StoreUnavailable):
            store.put(make_entry(2))
        assert time.monotonic() - began < SHORT
        redis_server.go_on()
        for _ in range(50):
            clock.now += 60
            if (got := store.get(make_key(1))) is not None:
                break
        assert_same(got, make_entry(1))


def test_a_stalled_server_does_not_take_a_large_put(redis_server):
    """The sockets' buffers fill up, and sendall blocks."""
    kv = torch.zeros(8, 2, 16, 576, 64)
    entry = CompactKV(kv, torch.arange(576), 576, key=make_key(1))
    with RedisStore(redis_server.url, timeout=SHORT, min_bandwidth=1e9) as store:
        redis_server.stall()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="no answer within"):
            store.put(entry)
        assert time.monotonic() - began < GENEROUS
        assert store.stats().put_failures == 1


def answer(sock: socket.socket, reply: bytes) -> None:
    """Sends ``reply`` to every command, and OK to redis-py's greeting."""
    pending = b""
    while data := sock.recv(65536):
        pending += data
        while pending.count(b"\r\n") >= 3:
            words, pending = command(pending)
            if words is None:
                break
            sock.sendall(b"+OK\r\n" if words[0] == b"CLIENT" else reply)


def command(pending: bytes) -> tuple[list[bytes] | None, bytes]:
    """The first command in the received bytes, and the rest; None if it is incomplete."""
    count, _, rest = pending.partition(b"\r\n")
    words = []
    for _ in range(int(count[1:])):
        length, _, rest = rest.partition(b"\r\n")
        if not length or len(rest) < int(length[1:]) + 2:
            return None, pending
        words.append(rest[: int(length[1:])])
        rest = rest[int(length[1:]) + 2 :]
    return words, rest


def never(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def dribble(head: bytes, pause: float = 0.01):
    """An endless reply, byte by byte, so that no single recv times out."""

    def behave(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(head)
        while True:
            sock.sendall(b"0")
            time.sleep(pause)

    return behave


def dribble_after_the_greeting(sock: socket.socket) -> None:
    pending = b""
    while data := sock.recv(65536):
        pending += data
        words, pending = command(pending)
        while words is not None and words[0] == b"CLIENT":
            sock.sendall(b"+OK\r\n")
            words, pending = command(pending) if pending else (None, b"")
        if words is not None:
            sock.sendall(b":1000\r\n$1000\r\n")
            while True:
                sock.sendall(b"0")
                time.sleep(0.01)


@pytest.mark.parametrize(
    "behave",
    [never, dribble(b"+"), dribble(b"$100000\r\n"), dribble_after_the_greeting],
    ids=["never", "greeting", "bulk", "value"],
)
def test_a_server_that_never_finishes(fake_server, behave, clock):
    server = fake_server(behave)
    with RedisStore(server.url, timeout=SHORT, clock=clock) as store:
        began = time.monotonic()
        assert store.get(make_key(1)) is None
        with pytest.raises(StoreUnavailable):
            store.put(make_entry(1))
        assert time.monotonic() - began < GENEROUS
        assert store.stats().failures == {"unavailable": 1}
        # The worker is free again too, because its connection was cut off.
        end = time.monotonic() + PATIENT
        while store._workers._idle < store._workers._threads and time.monotonic() < end:
            time.sleep(0.01)
        assert store._workers._idle == store._workers._threads


def test_a_name_that_cannot_be_looked_up_in_time(monkeypatch):
    """getaddrinfo has no timeout; the call does."""
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hang.wait(PATIENT) and [])
    with RedisStore("redis://cache.example", timeout=SHORT) as store:
        began = time.monotonic()
        assert store.get(make_key(1)) is None
        assert time.monotonic() - began < GENEROUS
        hang.set()


def test_what_arrived_in_time_is_served(redis_server, fake_server):
    """Of many keys, those whose values arrived before the server stopped answering are served."""
    entries = [make_entry(number) for number in range(3)]

    def behave(sock: socket.socket) -> None:
        pending, gets = b"", 0
        while data := sock.recv(65536):
            pending += data
            while pending:
                words, pending = command(pending)
                if words is None:
                    break
                if words[0] == b"CLIENT":
                    sock.sendall(b"+OK\r\n")
                elif words[0] == b"STRLEN":
                    sock.sendall(b":%d\r\n" % len(value_of(entries[0])))
                elif gets < 2:
                    value = value_of(entries[gets])
                    sock.sendall(b"$%d\r\n%s\r\n" % (len(value), value))
                    gets += 1

    # One second of the timeout is for a busy machine.
    with RedisStore(fake_server(behave).url, timeout=1 + SHORT) as store:
        got = store.get_many([entry.key for entry in entries])
        assert_same(got[0], entries[0])
        assert_same(got[1], entries[1])
        assert got[2] is None
        assert store.stats().failures == {"unavailable": 1}


# --- a server that is full


def test_a_full_server_refuses_puts_and_serves_gets(store, client, caplog):
    store.put(make_entry(1))
    client.config_set("maxmemory", 1)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            store.put(make_entry(2))
    assert "put of" in caplog.text and "maxmemory" in caplog.text
    assert_same(store.get(make_key(1)), make_entry(1))
    assert store.stats().put_failures == 2 and store.stats().failures == {}
    client.config_set("maxmemory", 0)
    store.put(make_entry(2))
    assert_same(store.get(make_key(2)), make_entry(2))


def test_a_server_that_evicts(store, client):
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    entries = [make_entry(number, tokens=100, layers=4) for number in range(100)]  # 5.5 MB
    for entry in entries:
        store.put(entry)
    got = store.get_many([entry.key for entry in entries])
    assert 0 < sum(entry is not None for entry in got) < 100
    for entry, found in zip(entries, got, strict=True):
        if found is not None:
            assert_same(found, entry)
    assert store.stats().failures == {} and store.stats().put_failures == 0


# --- damaged values


def spoil(value: bytes, how: str) -> bytes:
    flipped = bytearray(value)
    match how:
        case "empty":
            return b""
        case "truncated":
            return value[:-1]
        case "header only":
            return value[:4096]
        case "longer":
            return value + b"\0"
        case "payload":
            flipped[4100] ^= 1
        case "tail":
            flipped[-1] ^= 0x80
        case "digest":
            flipped[40] = flipped[40] ^ 1
        case "version":
            return value.replace(b'"version":"1"', b'"version":"2"')
        case "foreign":
            return b"\x80\x04\x95pickle" * 1000
        case "another key":
            return value_of(make_entry(1), make_key(2))
    return bytes(flipped)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("empty", "truncated"),
        ("truncated", "truncated"),
        ("header only", "truncated"),
        ("longer", "corrupt"),
        ("payload", "corrupt"),
        ("tail", "corrupt"),
        ("digest", "corrupt"),
        ("version", "version"),
        ("foreign", "foreign"),
        ("another key", "foreign"),
    ],
)
@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
def test_a_bad_value_is_a_miss_and_set_aside(redis_server, client, how, reason, many, caplog):
    with RedisStore(redis_server.url, timeout=PATIENT, fingerprint="model-a") as store:
        bad = spoil(value_of(make_entry(1)), how)
        client.set(name_of(1), bad)
        store.put(make_entry(3))
        if many:
            got = store.get_many([make_key(1), make_key(3)])
            assert got[0] is None
            assert_same(got[1], make_entry(3))
        else:
            assert store.get(make_key(1)) is None
        assert store.stats().failures == {reason: 1}
        assert make_key(1) in caplog.text and reason in caplog.text
        assert make_key(1) not in store
        (aside,) = client.scan_iter(f"{QUARANTINE}*")
        assert aside.startswith(f"{QUARANTINE}{name_of(1)}:".encode())
        assert client.get(aside) == bad
        assert 0 < client.ttl(aside) <= 86_400
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))


def test_a_key_that_holds_a_list(store, client):
    client.rpush(name_of(1), "not", "an", "entry")
    store.put(make_entry(2))
    assert store.get(make_key(1)) is None
    client.rpush(name_of(1), "again")
    assert [entry is not None for entry in store.get_many([make_key(1), make_key(2)])] == [
        False,
        True,
    ]
    assert store.stats().failures == {"foreign": 2}
    assert client.exists(name_of(1)) == 0
    assert [client.type(name) for name in client.scan_iter(f"{QUARANTINE}*")] == [b"list", b"list"]


def test_verify_sets_bad_values_aside(store, client):
    for number in range(4):
        store.put(make_entry(number))
    client.set(name_of(1), spoil(value_of(make_entry(1)), "payload"))
    report = store.verify()
    assert report.entries == 3 and list(report.bad) == [make_key(1)]
    assert "corrupt" in report.bad[make_key(1)]
    assert store.verify().ok and len(store) == 3


@pytest.mark.parametrize("when", ["before it is looked at again", "while it is renamed"])
def test_a_value_that_was_replaced_meanwhile_stays(store, client, monkeypatch, when):
    """A good value replaces a bad one after it was read and before it is set aside."""
    client.set(name_of(1), spoil(value_of(make_entry(1)), "payload"))
    ask = store._ask

    def interfere(connection, *words):
        if words[0] == ("WATCH" if "again" in when else "MULTI"):
            client.set(name_of(1), value_of(make_entry(1)))
        return ask(connection, *words)

    monkeypatch.setattr(store, "_ask", interfere)
    got = store.get(make_key(1))
    if "again" in when:
        assert_same(got, make_entry(1))
    else:
        assert got is None
    assert client.get(name_of(1)) == value_of(make_entry(1))
    assert not list(client.scan_iter(f"{QUARANTINE}*"))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert store.stats().failures == {"corrupt": 1}


def test_a_bad_value_that_is_gone_by_now(store, client, monkeypatch):
    client.set(name_of(1), b"bad")
    ask = store._ask

    def interfere(connection, *words):
        if words[0] == "WATCH":
            client.delete(name_of(1))
        return ask(connection, *words)

    monkeypatch.setattr(store, "_ask", interfere)
    assert store.get(make_key(1)) is None
    monkeypatch.undo()
    assert store.get(make_key(1)) is None
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


# --- arguments and secrets


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("http://localhost",), {}, ValueError, "expected redis://"),
        ((7,), {}, TypeError, "got int"),
        (("redis://localhost",), {"timeout": 0}, ValueError, "timeout above 0, got 0"),
        (("redis://localhost",), {"ttl": -1}, ValueError, "ttl above 0, got -1"),
        (
            ("redis://localhost",),
            {"min_bandwidth": "fast"},
            ValueError,
            "a number of bytes such as",
        ),
        (("redis://localhost",), {"prefix": "voco-kv:"}, ValueError, "prefix"),
        (("redis://localhost",), {"prefix": ""}, ValueError, "prefix"),
        (("redis://localhost",), {"back_off": (2, 1)}, ValueError, "back_off with"),
        (("redis://localhost",), {"connections": 0}, ValueError, "at least one"),
        (("redis://localhost?nonsense=1",), {}, ValueError, "nonsense"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=message):
        RedisStore(*arguments, **options)


def test_entries_of_another_model_are_refused(redis_server):
    with RedisStore(redis_server.url, fingerprint="model-b", timeout=PATIENT) as store:
        with pytest.raises(ValueError, match="model-b"):
            store.put(make_entry(1))
        with pytest.raises(ValueError, match="64"):
            store.get("no key")


@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
def test_another_model_s_entry_is_a_miss_and_stays(redis_server, many, caplog):
    with (
        RedisStore(redis_server.url, fingerprint="model-a", timeout=PATIENT) as ours,
        RedisStore(redis_server.url, fingerprint="model-b", timeout=PATIENT) as theirs,
    ):
        ours.put(make_entry(1))
        got = theirs.get_many([make_key(1)])[0] if many else theirs.get(make_key(1))
        assert got is None
        assert (theirs.stats().failures, theirs.stats().misses) == ({"model": 1}, 1)
        assert "model-a" in caplog.text and make_key(1) in caplog.text
        assert theirs.load_into(DynamicCache(), [make_key(1)]) == [make_key(1)]
        assert theirs.verify().ok and theirs.verify().entries == 1
        assert_same(ours.get(make_key(1)), make_entry(1))


def test_a_value_has_a_short_header_and_those_written_before_are_read(redis_server, client):
    """With half a megabyte of keys and values, as of one token of LLaVA-1.5-7B."""
    entry = make_entry(1)
    large = replace(entry, kv=torch.randn(32, 2, 32, 1, 128).bfloat16())
    with RedisStore(redis_server.url, timeout=PATIENT) as store:
        for each in (entry, large):
            store.put(each)
            assert client.strlen(name_of(1)) - (each.kv.nbytes + 8 + 4 * 8) < 1024
            assert_same(store.get(make_key(1)), each)
            padded = value_of(each)
            assert len(padded) == 4096 + each.kv.nbytes + 8 + 4 * 8
            client.set(name_of(1), padded)
            assert_same(store.get(make_key(1)), each)
            assert client.get(name_of(1)) == padded
        assert store.verify().ok


def test_without_redis_py_the_extra_is_named():
    with mock.patch.dict(sys.modules, redis=None):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[redis\]'"):
            RedisStore("redis://localhost")


def test_a_password_is_never_printed(redis_server, client, caplog):
    caplog.set_level(logging.DEBUG)
    client.execute_command("ACL", "SETUSER", "voco", "on", ">right", "~*", "+@all")
    url = redis_server.url.replace("://", "://voco:{}@")
    with RedisStore(url.format("right"), timeout=PATIENT) as store:
        store.put(make_entry(1))
        assert "right" not in repr(store)
    with RedisStore(url.format("s3cr3t"), timeout=PATIENT) as store:
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {"unavailable": 1}
        with pytest.raises(StoreUnavailable) as error:
            store.put(make_entry(1))
        assert "s3cr3t" not in f"{store} {error.value}"
    with pytest.raises(ValueError) as error:
        RedisStore("redis://user:s3cr3t/and@localhost")
    assert "s3cr3t" not in str(error.value)
    assert "s3cr3t" not in caplog.text and "right" not in caplog.text


# --- deadlines


def test_workers_return_and_raise():
    workers = Workers(2, "test")
    assert workers.run(lambda: 7, Deadline(PATIENT)) == 7
    with pytest.raises(ZeroDivisionError):
        workers.run(lambda: 1 // 0, Deadline(PATIENT))


def test_a_deadline_that_is_extended_is_waited_for():
    deadline = Deadline(0.05)

    def call():
        deadline.extend(PATIENT)
        time.sleep(0.1)
        return "done"

    assert Workers(1, "test").run(call, deadline) == "done"


def test_calls_that_hang_leave_the_other_workers():
    workers, hang, given_up = Workers(2, "test"), threading.Event(), []
    with pytest.raises(TimeoutError, match="no answer within"):
        workers.run(hang.wait, Deadline(0.05), lambda: given_up.append(1))
    assert given_up == [1]
    assert workers.run(lambda: 7, Deadline(PATIENT)) == 7
    with pytest.raises(TimeoutError):
        workers.run(hang.wait, Deadline(0.05))
    ran = []
    with pytest.raises(BusyError, match="2 workers"):
        workers.run(lambda: ran.append(1), Deadline(0.05))
    hang.set()
    assert workers.run(lambda: 7, Deadline(PATIENT)) == 7
    assert not ran, "a call that was given up before it began must not begin"


def test_a_breaker_lets_one_probe(clock):
    breaker = Breaker(1, 4, clock)
    assert breaker.allow() and breaker.allow()
    assert breaker.failed() == 1 and breaker.failed() == 1, "the second one was under way already"
    assert not breaker.allow() and breaker.left() == 1
    waits = []
    for _ in range(4):
        clock.now += breaker.left()
        assert breaker.allow() and not breaker.allow()
        waits.append(breaker.failed())
    assert waits == [2, 4, 4, 4]
    clock.now += 4
    assert breaker.allow()
    breaker.asked_nothing()
    assert not breaker.allow()
    clock.now += 4
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.allow() and breaker.failed() == 1
