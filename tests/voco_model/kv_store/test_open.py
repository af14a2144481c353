from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import voco_model
from tests.voco_model.kv_store.conftest import PATIENT
from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.kv_store.objects import ObjectStore
from voco_model.kv_store.open import open_store
from voco_model.kv_store.redis_store import RedisStore
from voco_model.kv_store.sizes import parse_size
from voco_model.kv_store.tiered import TieredStore


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("10GB", 10**10),
        ("10 gb", 10**10),
        ("10G", 10**10),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1e9", "ten", True, None, 1.5])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="10GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda path, size: KVStore(path, max_bytes=size),
        lambda path, size: KVStore(path, max_bytes=1, quarantine_bytes=size),
        lambda path, size: MemoryStore(size),
        lambda path, size: TieredStore([MemoryStore(1)], max_waiting_bytes=size),
    ],
    ids=["max_bytes", "quarantine_bytes", "memory", "tiers"],
)
def test_constructors_take_sizes_as_a_url_does(tmp_path, make):
    make(tmp_path, "20GB").close()
    make(tmp_path, np.int64(10**9)).close()
    for size in ("much", "-1GB", -1):
        with pytest.raises(ValueError, match="expected (max|quarantine)_"):
            make(tmp_path, size)
    for size in (1e9, True):
        with pytest.raises(TypeError, match="as an int or a size such as '20GB'"):
            make(tmp_path, size)


def test_sizes_are_kept_as_numbers(tmp_path):
    with KVStore(tmp_path, max_bytes="20GB", quarantine_bytes="1 MiB") as store:
        assert (store.max_bytes, store.quarantine_bytes) == (20 * 10**9, 2**20)
    assert MemoryStore("2GiB").stats().max_bytes == 2**31


def test_a_folder(tmp_path):
    for url, options in [
        (str(tmp_path / "a b"), {"max_bytes": "10GB"}),
        (tmp_path / "a b", {"max_bytes": 10**10}),
        (f"file://{tmp_path}/a%20b?max_bytes=10GB&fsync=false", {}),
        (f"file://localhost{tmp_path}/a%20b?max_bytes=10GB", {"fingerprint": None}),
    ]:
        with open_store(url, **options) as store:
            assert isinstance(store, KVStore)
            assert store.path == tmp_path / "a b"
            assert store.stats().max_bytes == 10**10
    with voco_model.open_store(
        str(tmp_path / "a b"), max_bytes="1GB", fingerprint="model-a"
    ) as store:
        assert store.fingerprint == "model-a"


def test_the_old_name_still_opens_a_store_and_says_so(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"voco_model\.open_store"):
        store = KVStore.open(str(tmp_path), max_bytes="1GB")
    with store:
        assert store.path == tmp_path and store.max_bytes == 10**9


def test_memory():
    store = open_store("memory://?max_bytes=1GiB&fingerprint=model-a&pin=no")
    assert isinstance(store, MemoryStore) and store.stats().max_bytes == 2**30


def test_redis(redis_server):
    pytest.importorskip("redis")
    url = f"{redis_server.url}?ttl=90&timeout=20&back_off=2,9&prefix=a:&connections=3&client_name=voco"
    with open_store(url) as store:
        assert isinstance(store, RedisStore)
        assert (store._ttl, store._timeout, store._prefix) == (90.0, 20.0, "a:")
        assert repr(store) == f"RedisStore('{redis_server.url}', prefix='a:')"
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
        with redis_server.client() as client:
            assert b"a:" + make_key(1).encode() in client.keys("*")
            assert "name=voco" in client.execute_command("CLIENT", "LIST").decode()
    with open_store(f"unix://{redis_server.socket}?db=2", timeout=PATIENT) as store:
        store.put(make_entry(1))
        assert store._connection_options["db"] == 2
    tls = open_store("rediss://u:p@cache.example:6380/4?ssl_cert_reqs=none")
    assert repr(tls) == "RedisStore('rediss://cache.example:6380/4', prefix='voco-kv:1:')"


def test_object_stores(tmp_path):
    pytest.importorskip("fsspec")
    store = open_store(f"local://{tmp_path}/x?timeout=20", storage_options={"auto_mkdir": False})
    assert isinstance(store, ObjectStore)
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert (tmp_path / "x" / "v1").is_dir()
    with pytest.raises(ImportError, match="s3fs"):
        open_store("s3://bucket/prefix")


@pytest.mark.parametrize("joined", [True, False])
def test_tiers(tmp_path, redis_server, joined):
    urls = [
        "memory://?max_bytes=1MB",
        f"file://{tmp_path}/store?max_bytes=10MB",
        f"{redis_server.url}?timeout=20",
    ]
    if joined:
        urls = " | ".join(urls)
    with open_store(
        urls, fingerprint="model-a", close_timeout=20, max_waiting_bytes="1MB"
    ) as store:
        assert isinstance(store, TieredStore)
        assert [type(tier) for tier in store.tiers] == [MemoryStore, KVStore, RedisStore]
        store.put(make_entry(1))
        assert store.flush(PATIENT)
        for tier in store.tiers:
            assert_same(tier.get(make_key(1)), make_entry(1))
            with pytest.raises(ValueError, match="model-a"):
                tier.put(make_entry(2, fingerprint="model-b"))


def test_tiers_that_are_open_already(tmp_path):
    memory = MemoryStore(10**6)
    with open_store([memory, f"file://{tmp_path}/x?max_bytes=1MB"]) as store:
        assert store.tiers[0] is memory and isinstance(store.tiers[1], KVStore)


def test_a_path_may_have_any_name(tmp_path):
    with open_store(tmp_path / "with|odd?name", max_bytes="1MB") as store:
        assert store.path == tmp_path / "with|odd?name"


def test_what_was_opened_is_closed_if_a_later_tier_cannot_be(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(KVStore, "close", lambda self: closed.append(self.path))
    memory = MemoryStore(10**6)
    memory.put(make_entry(1))
    with pytest.raises(ValueError, match="nonsense"):
        open_store([memory, f"file://{tmp_path}/x?max_bytes=1MB", "redis://localhost?nonsense=1"])
    assert closed == [tmp_path / "x"]
    assert make_key(1) in memory, "what was open before is the caller's"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("", {}, "expected a path"),
        ("path", {}, "expected max_bytes"),
        ("path?max_bytes=1GB", {}, "file:///path"),
        ("file:///", {"max_bytes": 1}, "absolute path"),
        ("file://relative/path?max_bytes=1", {}, "absolute path"),
        ("file:///path", {}, "expected max_bytes with file"),
        ("file:///path?max_bytes=much", {}, "max_bytes as a number of bytes .* got 'much'"),
        ("file:///path?max_bytes=1GB&max_bytes=2GB", {}, "got it twice"),
        ("file:///path?max_bytes=1GB", {"max_bytes": 1}, "got both"),
        ("file:///path?max_bytes=1GB&ttl=3", {}, "among max_bytes.*, got ttl"),
        ("file:///path?max_bytes=1GB&fsync=maybe", {}, "fsync as true or false"),
        ("file:///path?max_bytes=1GB&buffers=1", {}, "got buffers"),
        ("file:///path?max_bytes=1GB#x", {}, "without #"),
        ("memory://", {}, "expected max_bytes with memory"),
        ("memory://name?max_bytes=1", {}, "without a name"),
        ("redis://localhost?max_bytes=1GB", {}, "maxmemory"),
        ("redis://localhost?ttl=soon", {}, "ttl as a number of seconds"),
        ("redis://localhost?ttl=-3", {}, "ttl above 0"),
        ("redis://localhost?connections=few", {}, "connections as an integer"),
        ("redis://localhost?back_off=3", {}, "back_off as two numbers"),
        ("redis://localhost", {"nonsense": 1}, "got nonsense"),
        ("redis://u:pa/ss@localhost", {}, "percent-encoded"),
        ("redis://u:12/ss@localhost", {}, "percent-encoded"),
        ("redis://u:pa?ss@localhost", {}, "percent-encoded"),
        ("redis://u:pa#ss@localhost", {}, "percent-encoded"),
        ("ftq://host/path", {}, "scheme of fsspec, got ftq"),
        ("memory://?max_bytes=1|", {}, "expected a path"),
        ("memory://?max_bytes=1|redis://localhost", {"ttl": 3}, "several tiers among .*, got ttl"),
        ([], {}, "at least one tier"),
    ],
)
def test_what_cannot_be_opened(url, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_store(url, **options)
    for secret in ("pa", "ss@", "12"):
        if "u:" in str(url):
            assert secret not in str(error.value).replace("password", "").replace("passes", "")
    assert not list(Path(tmp_path).iterdir()), "nothing was made"
