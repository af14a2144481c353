"""``ObjectStore`` on fsspec's memory (puts are atomic) and local (write, then move) file systems."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import uuid
from unittest import mock

import pytest
import torch

from tests.voco_model.kv_store.conftest import PATIENT
from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.base import StoreUnavailable
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.format import encode
from voco_model.kv_store.objects import ObjectStore, without_password

fsspec = pytest.importorskip("fsspec")

SHORT = 0.2  # timeout in seconds for a file system that won't answer
GENEROUS = 10 * SHORT


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"memory://{uuid.uuid4().hex}/store"


@pytest.fixture
def store(url):
    with ObjectStore(url, timeout=PATIENT) as store:
        yield store


@pytest.fixture
def files(url):
    """Reads, writes and lists files under the store's URL, without the store."""
    fs, root = fsspec.core.url_to_fs(url)

    class Files:
        path = staticmethod(lambda n: f"{root}/v1/{make_key(n)[:2]}/{make_key(n)}.safetensors")
        read = staticmethod(fs.cat_file)
        names = staticmethod(lambda folder="": fs.find(f"{root}/{folder}".rstrip("/")))

        @staticmethod
        def write(number: int, data: bytes) -> None:
            fs.makedirs(Files.path(number).rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(Files.path(number), data)

    return Files


def value_of(entry, key: str | None = None) -> bytes:
    return b"".join(encode(entry, key or entry.key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_round_trip(store, files, dtype):
    entry = make_entry(1, tokens=3, dtype=dtype)
    assert store.get(entry.key) is None and entry.key not in store and list(store) == []
    store.put(entry)
    assert_same(store.get(entry.key), entry)
    assert files.names() == [files.path(1)] and files.read(files.path(1)) == value_of(entry)
    assert entry.key in store and list(store) == [entry.key] and len(store) == 1
    assert store.delete(entry.key) and not store.delete(entry.key)
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.puts, stats.deletes) == (1, 1, 1, 1)
    assert stats.failures == {}


def test_many_keys_in_many_folders(store):
    entries = [make_entry(number) for number in range(10)]
    keys = [f"{number:02x}" + "0" * 62 for number in range(10)]
    for entry, key in zip(entries, keys, strict=True):
        store.put(entry, key)
        store.put(entry)  # all of these in one folder
    assert sorted(store) == sorted({*keys, *(entry.key for entry in entries)})
    got = store.get_many([*keys, "f" * 64])
    assert got[-1] is None and all(
        torch.equal(g.kv, e.kv) for g, e in zip(got, entries, strict=False)
    )


def test_it_reads_a_copy_of_a_kvstores_folder(tmp_path):
    with KVStore(tmp_path / "store", max_bytes=10**6) as disk:
        disk.put(make_entry(1))
    with ObjectStore(f"file://{tmp_path}/store", timeout=PATIENT) as store:
        assert_same(store.get(make_key(1)), make_entry(1))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda value: value[:-1], "truncated"),
        (lambda value: b"", "truncated"),
        (lambda value: value[:4100] + bytes([value[4100] ^ 1]) + value[4101:], "corrupt"),
        (lambda value: b"\x80\x04\x95pickle" * 1000, "foreign"),
        (lambda value: value_of(make_entry(1), make_key(2)), "foreign"),
        (lambda value: value.replace(b'"version":"1"', b'"version":"2"'), "version"),
    ],
)
def test_a_bad_object_is_a_miss_and_set_aside(url, files, spoil, reason, caplog):
    with ObjectStore(url, timeout=PATIENT, fingerprint="model-a") as store:
        bad = spoil(value_of(make_entry(1)))
        files.write(1, bad)
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {reason: 1}
        assert reason in caplog.text and make_key(1) in caplog.text
        assert make_key(1) not in store and list(store) == []
        (aside,) = files.names("quarantine")
        assert files.read(aside) == bad
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))


def test_another_model_s_entry_is_a_miss_and_stays(url, files, caplog):
    with (
        ObjectStore(url, timeout=PATIENT, fingerprint="model-a") as ours,
        ObjectStore(url, timeout=PATIENT, fingerprint="model-b") as theirs,
    ):
        ours.put(make_entry(1))
        assert theirs.get(make_key(1)) is None
        assert (theirs.stats().failures, theirs.stats().misses) == ({"model": 1}, 1)
        assert "model-a" in caplog.text and make_key(1) in caplog.text
        report = theirs.verify()
        assert report.entries == 1 and not report.bad
        assert_same(ours.get(make_key(1)), make_entry(1))


def test_a_folder_where_an_object_should_be(store, files):
    fs = fsspec.core.url_to_fs(store._url)[0]
    fs.makedirs(files.path(1))
    fs.pipe_file(f"{files.path(1)}/inside", b"?")
    assert store.get(make_key(1)) is None
    assert store.stats().failures == {"foreign": 1}


@pytest.mark.parametrize("when", ["before it is looked at again", "before it is moved"])
def test_an_object_that_was_replaced_meanwhile_stays(store, files, monkeypatch, when):
    files.write(1, b"bad")
    step = "_fetch" if "again" in when else "_move"
    original = getattr(store, step)
    calls = []

    def interfere(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if "again" in when else 1):
            files.write(1, value_of(make_entry(1)))
        return original(*arguments)

    monkeypatch.setattr(store, step, interfere)
    assert_same(store.get(make_key(1)), make_entry(1))
    assert files.read(files.path(1)) == value_of(make_entry(1))
    assert files.names("quarantine") == []


def test_verify(store, files):
    for number in range(3):
        store.put(make_entry(number))
    files.write(1, b"bad")
    report = store.verify()
    assert report.entries == 2 and list(report.bad) == [make_key(1)]
    assert store.verify().ok


def test_no_half_written_object_has_its_name(tmp_path, monkeypatch):
    """On a file system without atomic puts, a failed write leaves nothing behind."""
    store = ObjectStore(f"file://{tmp_path}/store", timeout=PATIENT, back_off=(0, 0))
    store.put(make_entry(1))
    fs_type = type(store._workers.run(store._file_system, _long())[0])
    pipe = fs_type.pipe_file

    def break_off(self, path, value, *args, **kwargs):
        pipe(self, path, value[: len(value) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs_type, "pipe_file", break_off)
    for number in (1, 2):
        with pytest.raises(StoreUnavailable, match="No space left"):
            store.put(make_entry(number))
    monkeypatch.undo()
    assert_same(store.get(make_key(1)), make_entry(1))
    assert store.get(make_key(2)) is None and store.stats().failures == {}
    assert store.stats().put_failures == 2
    assert not list((tmp_path / "store" / "tmp").iterdir())


def _long():
    from voco_model.kv_store.bounded import Deadline

    return Deadline(PATIENT)


def test_a_file_system_that_hangs(monkeypatch, caplog):
    from fsspec.implementations.memory import MemoryFileSystem

    now = [0.0]
    name = uuid.uuid4().hex
    store = ObjectStore(f"memory://{name}", timeout=SHORT, clock=lambda: now[0])
    hang = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: hang.wait(PATIENT))
    began = time.monotonic()
    assert store.get(make_key(1)) is None
    assert store.get(make_key(1)) is None
    with pytest.raises(StoreUnavailable, match="asked again in 1 s"):
        store.put(make_entry(1))
    assert time.monotonic() - began < GENEROUS
    assert store.stats().failures == {"unavailable": 1, "backing off": 1}
    assert "staying away for 1 s" in caplog.text
    monkeypatch.undo()
    hang.set()
    for _ in range(50):  # the machine may be busy
        now[0] += 1000
        try:
            store.put(make_entry(1))
            break
        except StoreUnavailable:
            pass
    for _ in range(50):
        now[0] += 1000
        if (got := store.get(make_key(1))) is not None:
            break
    assert_same(got, make_entry(1))


def test_a_file_system_that_fails(store, monkeypatch):
    class LibraryError(Exception):
        pass

    def fail(*_):
        raise LibraryError("503 Slow Down")

    def file_system():
        raise LibraryError("503 Slow Down")

    monkeypatch.setattr(store, "_file_system", file_system)
    assert store.get(make_key(1)) is None
    for ask in (lambda: store.delete(make_key(1)), lambda: [*iter(store)], lambda: len(store)):
        with pytest.raises(StoreUnavailable):
            ask()
    assert make_key(1) not in store
    assert store.stats().failures == {"unavailable": 1}


def test_arguments_that_do_not_fit(store):
    for arguments, options, message in [
        (("nonsense://x",), {}, "not known"),
        (("path",), {}, "expected a URL"),
        (("memory://x",), {"timeout": 0}, "timeout above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ObjectStore(*arguments, **options)
    with pytest.raises(ValueError, match="64"):
        store.get("no key")
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.get(make_key(1))


def test_missing_packages_are_named():
    with mock.patch.dict(sys.modules, fsspec=None):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[objects\]'"):
            ObjectStore("memory://x")
    with mock.patch.dict(sys.modules, s3fs=None):
        with pytest.raises(ImportError, match="s3fs"):
            ObjectStore("s3://bucket/path")


def test_secrets_are_never_printed(monkeypatch, caplog):
    store = ObjectStore("memory://u:s3cr3t@host/x", timeout=PATIENT)
    store._secrets.append("t0k3n")
    assert "s3cr3t" not in repr(store)

    def file_system():
        raise OSError("cannot open u:s3cr3t@host with t0k3n")

    monkeypatch.setattr(store, "_file_system", file_system)
    with pytest.raises(StoreUnavailable) as error:
        store.put(make_entry(1))
    assert "***" in str(error.value)
    printed = "".join(traceback.format_exception(error.value)) + caplog.text
    assert "s3cr3t" not in printed and "t0k3n" not in printed
    assert without_password("redis://u:a/b@h/0?x=1") == "redis://u:***@h/0?x=1"
    assert without_password("unix:///s?db=0&password=x") == "unix:///s?db=0&password=***"
