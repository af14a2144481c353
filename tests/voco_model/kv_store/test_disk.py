"""``KVStore``: entries that were put are served, damaged ones are misses, eviction is by last use."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import statistics
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store import writing
from voco_model.kv_store.base import StoreUnavailable
from voco_model.kv_store.buffers import BufferPool
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.format import EntryError, encode

SIZE = sum(map(len, encode(make_entry(0), make_key(0))))  # bytes on disk of each entry here
ROOMY = 1000 * SIZE


@pytest.fixture
def store(tmp_path):
    with KVStore(tmp_path / "store", max_bytes=ROOMY, fsync=False) as store:
        yield store


def file_of(store: KVStore, number: int) -> Path:
    key = make_key(number)
    return store.path / "v1" / key[:2] / f"{key}.safetensors"


def files(store: KVStore, folder: str) -> list[Path]:
    return sorted(path for path in (store.path / folder).rglob("*") if path.is_file())


def spoil(path: Path, at: int, byte: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= byte
    path.write_bytes(data)


def held(store: KVStore) -> set[int]:
    return {int(key, 16) for key in store}


def check_consistent(store: KVStore) -> None:
    """Checks that the index agrees with the files."""
    on_disk = {path.stem: path.stat().st_size for path in files(store, "v1")}
    stats = store.stats()
    assert set(store) == set(on_disk)
    assert (stats.entries, stats.bytes) == (len(on_disk), sum(on_disk.values()))
    assert len(store) == len(on_disk)


# --- the interface


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn],
    ids=str,
)
def test_what_was_put_is_got(store, dtype):
    entry = make_entry(1, tokens=3, layers=3, dtype=dtype)
    store.put(entry)
    assert_same(store.get(entry.key), entry)
    assert entry.key in store and make_key(2) not in store
    assert store.get(make_key(2)) is None
    assert list(store) == [entry.key]


def test_get_many_delete_and_clear(store):
    entries = [make_entry(number) for number in range(4)]
    for entry in entries:
        store.put(entry)
    keys = [entry.key for entry in entries]
    store.prefetch([*keys, make_key(99)])
    got = store.get_many([keys[2], make_key(99), keys[0]])
    assert_same(got[0], entries[2])
    assert got[1] is None
    assert_same(got[2], entries[0])
    assert store.delete(keys[2]) and not store.delete(keys[2])
    assert held(store) == {0, 1, 3}
    check_consistent(store)
    store.clear()
    assert len(store) == 0 and not files(store, "v1")
    check_consistent(store)
    stats = store.stats()
    assert (stats.puts, stats.deletes, stats.hits, stats.misses) == (4, 4, 2, 1)


def test_large_entries_are_read_in_chunks(store):
    """In several chunks for the checksum, the last of which is shorter."""
    entry = make_entry(1, tokens=700, layers=48, dtype=torch.float32)
    assert entry.nbytes > 4 * 2**20
    with KVStore(store.path, max_bytes=100 * 2**20, fsync=False) as large:
        large.put(entry)
        assert_same(large.get(entry.key), entry)
        spoil(file_of(large, 1), -1)
        assert large.get(entry.key) is None


def test_putting_again_replaces(store):
    other = make_entry(2, tokens=5)
    store.put(make_entry(1))
    before = store.get(make_key(1))
    store.put(other, key=make_key(1))
    got = store.get(make_key(1))
    assert torch.equal(got.kv, other.kv) and got.key == make_key(1)
    assert_same(before, make_entry(1))  # tensors from get don't change
    check_consistent(store)
    store.put(make_entry(1))
    check_consistent(store)
    assert len(store) == 1


def test_arguments_are_checked(store, tmp_path):
    with pytest.raises(ValueError, match="expected a key, got none with the entry"):
        store.put(make_entry(1).__class__(make_entry(1).kv, make_entry(1).positions, 9))
    for use in (
        store.get,
        store.delete,
        store.__contains__,
        lambda key: store.put(make_entry(1), key),
    ):
        with pytest.raises(ValueError, match="expected a key of 64 lower-case hex digits"):
            use("../../../../etc/passwd")
    with pytest.raises(TypeError, match="expected a CompactKV"):
        store.put(make_entry(1).kv, make_key(1))
    with pytest.raises(ValueError, match="expected max_bytes >= 1"):
        KVStore(tmp_path / "other", max_bytes=0)
    with pytest.raises(TypeError, match="expected max_bytes as an int"):
        KVStore(tmp_path / "other", max_bytes=1e9)
    with KVStore(tmp_path / "small", max_bytes=SIZE - 1) as small:
        with pytest.raises(ValueError, match=f"expected an entry of up to max_bytes = {SIZE - 1}"):
            small.put(make_entry(1))
    store.close()
    for use in (store.get, store.delete):
        with pytest.raises(ValueError, match="expected an open store"):
            use(make_key(1))


def test_a_store_of_one_model_keeps_and_serves_only_its_entries(tmp_path, caplog):
    with KVStore(tmp_path, max_bytes=ROOMY) as anyones:
        anyones.put(make_entry(1, fingerprint="model-b"))
    with KVStore(tmp_path, max_bytes=ROOMY, fingerprint="model-a") as store:
        with pytest.raises(ValueError, match="expected an entry of the model"):
            store.put(make_entry(2, fingerprint="model-b"))
        unmarked = make_entry(4, fingerprint="")  # as compress makes them without a store
        with pytest.raises(ValueError, match=r"put dataclasses.replace\(entry, fingerprint=store"):
            store.put(unmarked)
        store.put(replace(unmarked, fingerprint=store.fingerprint))
        store.put(make_entry(3))
        assert store.get(make_key(3)) is not None and make_key(4) in store
        assert store.get(make_key(1)) is None
        assert store.stats().failures == {"model": 1}


def test_it_is_all_there_when_opened_again(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY) as store:
        for number in range(3):
            store.put(make_entry(number))
    with KVStore(tmp_path, max_bytes=ROOMY) as store:
        assert held(store) == {0, 1, 2}
        assert_same(store.get(make_key(1)), make_entry(1))
        assert store.stats().index_rebuilds == 0
        check_consistent(store)


# --- a few layers at a time


def test_a_reader_gives_layers_as_they_come(store):
    entry = make_entry(1, tokens=3, layers=7, dtype=torch.int8)
    store.put(entry)
    layer = entry.kv[0].nbytes
    for chunk in (1, layer, 3 * layer, 100 * layer):
        kv = torch.empty_like(entry.kv)
        with store.reader(entry.key) as reader:
            for first, layers in reader.layers(chunk_nbytes=chunk):
                kv[first : first + len(layers)] = layers
            assert_same(reader.finish(kv), entry)
    whole = bytearray(entry.kv.nbytes)
    with store.reader(entry.key) as reader:
        for first, layers in reader.layers(memoryview(whole), chunk_nbytes=2 * layer):
            assert torch.equal(layers, entry.kv[first : first + len(layers)])
    assert whole == entry.kv.numpy().tobytes()
    assert store.stats().hits == 5
    with store.reader(make_key(2)) as reader:
        assert reader is None


def test_a_reader_requires_all_layers_in_order(store):
    store.put(make_entry(1, layers=3))
    memory = memoryview(bytearray(1000))
    with store.reader(make_key(1)) as reader:
        with pytest.raises(ValueError, match="in order"):
            reader.read(1, 1, memory)
        reader.read(0, 1, memory)
        with pytest.raises(ValueError, match="before the checksum is verified"):
            reader.check()
        with pytest.raises(ValueError, match="in order"):
            reader.read(1, 3, memory)
        with pytest.raises(ValueError, match="expected memory of"):
            reader.read(1, 2, memory[:10])


def test_a_reader_says_at_the_end_that_all_was_wrong(store):
    store.put(make_entry(1, layers=4))
    spoil(file_of(store, 1), 4096 + 5)
    seen = []
    with pytest.raises(EntryError, match="corrupt"), store.reader(make_key(1)) as reader:
        for first, _ in reader.layers(chunk_nbytes=1):
            seen.append(first)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(EntryError, match="corrupt"):
        reader.check()
    assert not file_of(store, 1).exists()
    assert (store.stats().failures, store.stats().hits) == ({"corrupt": 1}, 0)


# --- damaged files


BAD = {
    "header": (lambda path: spoil(path, 200), {"corrupt", "foreign"}),
    "digest": (lambda path: spoil(path, 40, 0x01), {"corrupt"}),
    "kv": (lambda path: spoil(path, 4096 + 3), {"corrupt"}),
    "positions": (lambda path: spoil(path, -40), {"corrupt"}),
    "rope": (lambda path: spoil(path, -1), {"corrupt"}),
    "cut off": (lambda path: os.truncate(path, SIZE - 1), {"truncated"}),
    "half": (lambda path: os.truncate(path, SIZE // 2), {"truncated"}),
    "only a header": (lambda path: os.truncate(path, 4096), {"truncated"}),
    "empty": (lambda path: os.truncate(path, 0), {"truncated"}),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), {"corrupt"}),
    "foreign": (lambda path: path.write_bytes(b"PK\3\4" + bytes(9000)), {"foreign"}),
    "another key's": (
        lambda path: path.write_bytes(b"".join(encode(make_entry(2), make_key(2)))),
        {"foreign"},
    ),
    "a newer version": (
        lambda path: path.write_bytes(
            path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
        ),
        {"version"},
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), {"foreign"}),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), {"foreign"}),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_files_are_a_miss_and_set_aside(store, how, caplog):
    spoiler, reasons = BAD[how]
    for number in (1, 5):
        store.put(make_entry(number))
    spoiler(file_of(store, 1))
    with caplog.at_level(logging.WARNING, "voco_model.kv_store"):
        assert store.get(make_key(1)) is None
    stats = store.stats()
    (reason,) = stats.failures
    assert reason in reasons and stats.failures[reason] == 1
    assert (stats.misses, stats.hits, stats.quarantined) == (1, 0, 1)
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in (make_key(1), reason, "quarantine"))
    assert len(list((store.path / "quarantine").iterdir())) == 1
    assert make_key(1) not in store and held(store) == {5}
    # The caller compresses the image again.
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
    check_consistent(store)
    assert store.get(make_key(1)) is not None and store.stats().quarantined == 1


def test_the_reader_deals_with_bad_headers_too(store):
    store.put(make_entry(1))
    spoil(file_of(store, 1), 90)
    with store.reader(make_key(1)) as reader:
        assert reader is None
    assert len(files(store, "quarantine")) == 1


def test_a_good_file_that_came_meanwhile_is_not_set_aside(store, caplog):
    store.put(make_entry(1))
    spoil(file_of(store, 1), 4096)
    with pytest.raises(EntryError), store.reader(make_key(1)) as reader:
        store.put(make_entry(1))
        list(reader.layers())
    assert_same(store.get(make_key(1)), make_entry(1))
    assert not files(store, "quarantine")
    assert "another file has replaced it" in caplog.text
    check_consistent(store)


def test_quarantine_is_bounded_and_the_oldest_goes_first(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False, quarantine_bytes=2 * SIZE) as store:
        for number in range(5):
            store.put(make_entry(number))
            spoil(file_of(store, number), 4096)
            assert store.get(make_key(number)) is None
        kept = {path.name.split(".")[0] for path in files(store, "quarantine")}
        assert kept == {make_key(3), make_key(4)}
        assert store.stats().quarantined == 5


def test_a_disk_that_fails_is_a_miss(store, monkeypatch, caplog):
    store.put(make_entry(1))
    store.put(make_entry(2))

    def fail(code):
        def preadv(*_):
            raise OSError(code, os.strerror(code))

        return preadv

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail(errno.EIO))
        assert store.get(make_key(1)) is None
        assert len(files(store, "quarantine")) == 1
        patch.setattr(os, "preadv", fail(errno.ENOMEM))  # not the file's fault
        assert store.get(make_key(2)) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail(errno.EMFILE))
        assert store.get(make_key(2)) is None
    assert store.stats().failures == {"unreadable": 3}
    assert_same(store.get(make_key(2)), make_entry(2))


# --- eviction


def test_the_least_recently_used_go_first(tmp_path):
    with KVStore(tmp_path, max_bytes=3 * SIZE, fsync=False) as store:
        for number in range(3):
            store.put(make_entry(number))
        assert store.get(make_key(0)) is not None
        store.put(make_entry(3))
        assert held(store) == {0, 2, 3}
        with store.reader(make_key(2)) as reader:
            list(reader.layers())
        store.put(make_entry(4))
        assert held(store) == {2, 3, 4}
        store.put(make_entry(2))  # a put counts as a use
        store.put(make_entry(5))
        assert held(store) == {2, 4, 5}
        stats = store.stats()
        assert (stats.evictions, stats.bytes, stats.overfull) == (3, 3 * SIZE, 0)
        check_consistent(store)


def test_another_handle_s_uses_count(tmp_path):
    with (
        KVStore(tmp_path, max_bytes=3 * SIZE, fsync=False) as one,
        KVStore(tmp_path, max_bytes=3 * SIZE, fsync=False) as other,
    ):
        for number in range(3):
            one.put(make_entry(number))
        for _ in range(2):
            other.get(make_key(0))
            other.get(make_key(1))
        one.put(make_entry(3))
        assert held(other) == {0, 1, 3}
        check_consistent(other)


def test_a_large_entry_takes_the_place_of_several(tmp_path):
    with KVStore(tmp_path, max_bytes=4 * SIZE, fsync=False) as store:
        for number in range(4):
            store.put(make_entry(number))
        store.put(make_entry(9, tokens=50, layers=2))
        assert 9 in held(store)
        assert store.stats().bytes <= 4 * SIZE
        check_consistent(store)


def test_what_is_in_use_is_not_evicted(tmp_path, caplog):
    with KVStore(tmp_path, max_bytes=2 * SIZE, fsync=False) as store:
        store.put(make_entry(0))
        store.put(make_entry(1))
        with store.hold(make_key(0)) as there, store.reader(make_key(1)):
            assert there
            store.put(make_entry(2))
            # All else is in use: the store exceeds its limit rather than refuse the entry.
            assert held(store) == {0, 1, 2}
            assert store.stats().overfull == 1 and "in use" in caplog.text
            with store.hold(make_key(77)) as there:
                assert not there
        store.put(make_entry(3))
        # 1 was used by its reader after 2; holding 0 didn't count as a use.
        assert len(held(store)) == 2 and 3 in held(store)
        assert store.stats().bytes == 2 * SIZE
        check_consistent(store)


def test_rows_without_files_heal(tmp_path):
    with KVStore(tmp_path, max_bytes=3 * SIZE, fsync=False) as store:
        for number in range(3):
            store.put(make_entry(number))
        file_of(store, 1).unlink()
        store.put(make_entry(3))
        store.put(make_entry(4))
        assert held(store) == {2, 3, 4}
        check_consistent(store)


def test_clocks_that_went_back_do_no_harm(tmp_path):
    with KVStore(tmp_path, max_bytes=3 * SIZE, fsync=False) as store:
        for number in range(3):
            store.put(make_entry(number))
            later = time.time_ns() + (10 - number) * 10**12
            os.utime(file_of(store, number), ns=(later, later))
        for number in range(3, 8):
            store.put(make_entry(number))
            assert store.stats().bytes <= 3 * SIZE
        check_consistent(store)


# --- repair


def test_verify_finds_what_is_wrong_and_puts_it_right(store):
    for number in range(6):
        store.put(make_entry(number))
    assert store.verify().ok
    spoil(file_of(store, 0), 4096)
    os.truncate(file_of(store, 1), 10)
    file_of(store, 2).unlink()
    # Two files that the index doesn't have, and one that isn't an entry.
    adopted = file_of(store, 9)
    adopted.parent.mkdir(exist_ok=True)
    adopted.write_bytes(b"".join(encode(make_entry(9, tokens=2), make_key(9))))
    (adopted.parent / "notes.txt").write_text("hello")
    misplaced = store.path / "v1" / "zz" / file_of(store, 3).name
    misplaced.parent.mkdir()
    misplaced.write_bytes(file_of(store, 3).read_bytes())

    report = store.verify()
    assert report.bad == {
        make_key(0): "corrupt",
        make_key(1): "truncated",
        "notes.txt": "foreign",
        misplaced.name: "foreign",
    }
    assert report.added == [make_key(9)] and report.dropped == [make_key(2)]
    assert report.entries == 4 and not report.ok
    assert len(files(store, "quarantine")) == 4
    check_consistent(store)
    again = store.verify()
    assert again.ok and again.entries == 4 and again.bytes == store.stats().bytes
    assert (store.stats().misses, store.stats().hits) == (0, 0)


def test_leftovers_of_dead_writers_are_swept_and_those_of_living_ones_are_not(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY) as store:
        store.put(make_entry(1))
        dead = store.path / "tmp" / f"{make_key(2)}.1-00"
        dead.write_bytes(bytes(100))
        with store._files.temporary(make_key(3)) as (_, living):
            with KVStore(tmp_path, max_bytes=ROOMY):
                assert not dead.exists() and os.path.exists(living)
        assert not files(store, "tmp")
        check_consistent(store)


@pytest.mark.parametrize("when", ["verified", "full"])
def test_leftovers_are_swept_from_a_store_that_stays_open(store, monkeypatch, when):
    store.put(make_entry(1))
    dead = store.path / "tmp" / f"{make_key(2)}.1-00"
    dead.write_bytes(bytes(100))
    if when == "verified":
        assert store.verify().ok
    else:
        store._writer.make_room(0, ROOMY, OSError(errno.ENOSPC, "full"))
    assert not dead.exists()


def damage_by_garbage(path):
    path.write_bytes(os.urandom(20_000))


def damage_by_zeros(path):
    path.write_bytes(b"")


def damage_in_the_middle(path):
    data = bytearray(path.read_bytes())
    data[100:] = os.urandom(len(data) - 100)
    path.write_bytes(data)


def replace_by_a_foreign_one(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE entries (unrelated TEXT)")
    connection.close()


def replace_by_a_newer_one(path):
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()


def remove(path):
    path.unlink()


DAMAGE = [
    damage_by_garbage,
    damage_by_zeros,
    damage_in_the_middle,
    replace_by_a_foreign_one,
    replace_by_a_newer_one,
    remove,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("when", ["closed", "open"])
def test_an_index_that_is_gone_or_unusable_is_made_again(tmp_path, damage, when, caplog):
    limit = 4 * SIZE
    store = KVStore(tmp_path, max_bytes=limit, fsync=False)
    for number in (2, 0, 3, 1):
        store.put(make_entry(number))
    store.get(make_key(2))
    if damage in (replace_by_a_newer_one, damage_in_the_middle) and when == "open":
        pytest.skip("an open handle has read these pages already")
    if when == "closed":
        store.close()
    damage(store.path / "index.sqlite")
    if when == "closed":
        store = KVStore(tmp_path, max_bytes=limit, fsync=False)
    assert_same(store.get(make_key(3)), make_entry(3))  # used after 2
    check_consistent(store)
    assert store.stats().entries == 4 and store.stats().index_rebuilds == 1
    aside = [path for path in store.path.iterdir() if "set-aside" in path.name]
    assert len(aside) == (damage is not remove)
    assert ("set the index" in caplog.text) == (damage is not remove)
    # Eviction is still in the order of uses.
    for new, left in ((5, {1, 2, 3, 5}), (6, {2, 3, 5, 6}), (7, {3, 5, 6, 7}), (8, {5, 6, 7, 8})):
        store.put(make_entry(new))
        assert held(store) == left
    assert store.verify().ok
    store.close()


def test_an_index_replaced_under_a_handle_is_noticed(tmp_path):
    with (
        KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as one,
        KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as other,
    ):
        one.put(make_entry(1))
        (tmp_path / "index.sqlite").unlink()
        other.put(make_entry(2))
        one.put(make_entry(3))
        for store in (one, other):
            check_consistent(store)
        assert one.verify().ok


def test_damage_in_rows_is_found_by_verify(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        for number in range(40):
            store.put(make_entry(number))
    data = bytearray((tmp_path / "index.sqlite").read_bytes())
    data[3 * 4096 + 2000 : 3 * 4096 + 4000] = bytes(2000)
    (tmp_path / "index.sqlite").write_bytes(data)
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        store.verify()
        check_consistent(store)
        assert len(store) == 40


def test_an_old_journal_is_not_rolled_back_into_a_new_index(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        store.put(make_entry(1))
    (tmp_path / "index.sqlite").write_bytes(b"garbage" * 1000)
    (tmp_path / "index.sqlite-journal").write_bytes(os.urandom(9000))
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        assert held(store) == {1}
        assert store.verify().ok


@contextmanager
def index_locked(path: Path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_entries_can_be_read_while_the_index_is_locked(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False, index_timeout=0.1) as store:
        store.put(make_entry(1))
        store.put(make_entry(2))
        with index_locked(tmp_path / "index.sqlite"):
            assert_same(store.get(make_key(1)), make_entry(1))
            spoil(file_of(store, 2), 4096)
            assert store.get(make_key(2)) is None  # set aside; the index is updated later
            assert store.get(make_key(3)) is None
            with pytest.raises(StoreUnavailable, match="index .* was not available within"):
                store.put(make_entry(3))
            assert not files(store, "tmp")
            with KVStore(tmp_path, max_bytes=ROOMY, index_timeout=0.1) as second:
                assert_same(second.get(make_key(1)), make_entry(1))
        assert store.stats().put_failures == 1
        store.put(make_entry(3))
        assert store.verify().dropped == [make_key(2)]
        check_consistent(store)


# --- a full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_makes_room_once_and_then_says_so(store, monkeypatch, code, caplog):
    for number in range(30):
        store.put(make_entry(number))
    evicted = -(-(SIZE + writing.INDEX_ROOM) // SIZE)
    room = [0]  # attempts that fail
    writev = os.writev

    def full(fd, parts):
        if room[0] == 0:
            return writev(fd, parts)
        room[0] -= 1
        writev(fd, [bytes(parts[0][:1000])])  # a partial write
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "writev", full)
    room[0] = 1
    store.put(make_entry(100))
    assert_same(store.get(make_key(100)), make_entry(100))
    assert held(store) == {*range(evicted, 30), 100} and "no room" in caplog.text
    room[0] = 100
    with pytest.raises(OSError) as failed:
        store.put(make_entry(101))
    assert failed.value.errno == code
    room[0] = 0
    assert not files(store, "tmp") and 101 not in held(store)
    assert (store.stats().put_failures, store.stats().puts) == (1, 31)
    for number in held(store):
        assert_same(store.get(make_key(number)), make_entry(number))
    check_consistent(store)
    assert store.verify().ok


def test_short_writes_are_continued(store, monkeypatch):
    writev = os.writev

    def dribble(fd, parts):
        return writev(fd, [bytes(parts[0][:777])])

    monkeypatch.setattr(os, "writev", dribble)
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


@pytest.fixture
def tiny_disk(tmp_path):
    """A separate file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(
            "may not mount a tmpfs here; the disk that is full by monkeypatch runs anywhere"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    """With max_bytes of 1 GB on a disk of 1 MB, new entries replace older ones."""
    with KVStore(tiny_disk, max_bytes=10**9) as store:
        for number in range(400):
            store.put(make_entry(number))
            assert_same(store.get(make_key(number)), make_entry(number))
        stats = store.stats()
        assert stats.puts == 400 and stats.evictions > 100 and stats.put_failures == 0
        large = make_entry(1000, tokens=1000, layers=40)
        with pytest.raises(OSError) as failed:
            store.put(large)
        assert failed.value.errno == errno.ENOSPC
        assert not files(store, "tmp")
        store.put(make_entry(2000))
        assert_same(store.get(make_key(2000)), make_entry(2000))
        assert not store.verify().bad
        check_consistent(store)


# --- threads, forks, many entries


def test_threads_share_a_handle(tmp_path):
    with KVStore(tmp_path, max_bytes=12 * SIZE, fsync=False) as store:
        entries = [make_entry(number) for number in range(24)]
        problems = []

        def work(seed: int) -> None:
            try:
                for step in range(60):
                    entry = entries[(seed * 7 + step * 5) % 24]
                    if step % 3 == 0:
                        store.put(entry)
                    elif (got := store.get(entry.key)) is not None:
                        assert_same(got, entry)
            except BaseException as error:
                problems.append(error)
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        stats = store.stats()
        assert stats.puts == 6 * 20 and stats.hits + stats.misses == 6 * 40
        assert not stats.failures and stats.bytes <= 12 * SIZE
        check_consistent(store)
        assert store.verify().ok


def test_a_handle_works_on_both_sides_of_a_fork(tmp_path):
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        store.put(make_entry(1))
        served = store.get(make_key(1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number in range(2, 12):
                    store.put(make_entry(number))
                    assert_same(store.get(make_key(number)), make_entry(number))
                assert_same(store.get(make_key(1)), make_entry(1))
                assert store.buffers.held <= BufferPool().limit
                status = 0
            finally:
                os._exit(status)
        for number in range(12, 22):
            store.put(make_entry(number))
        assert os.waitpid(child, 0)[1] == 0
        assert_same(served, make_entry(1))
        assert held(store) == set(range(1, 22))
        check_consistent(store)


def test_two_puts_of_one_key_leave_the_row_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Another put, and a delete of its entry, between this put's rename and its check of the row."""
    with (
        KVStore(tmp_path, max_bytes=2 * SIZE, fsync=False) as one,
        KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as other,
    ):
        for evicted in (False, True):

            def meanwhile(path, evicted=evicted):
                monkeypatch.undo()
                other.put(make_entry(2, tokens=9), key=make_key(1))
                if evicted:
                    other.delete(make_key(1))

            monkeypatch.setattr("voco_model.kv_store.files.sync_folder", meanwhile)
            monkeypatch.setattr(one._files, "sync", True)
            one.put(make_entry(1))
            assert held(one) == (set() if evicted else {1})
            check_consistent(one)
            assert one.verify().ok


@pytest.mark.slow
def test_a_hundred_thousand_entries(tmp_path):
    """Opens in less than a second, and reads as fast as a store of ten entries."""
    count = 100_000
    with KVStore(tmp_path / "few", max_bytes=10**12, fsync=False) as few:
        for number in range(10):
            few.put(make_entry(number))
    many_path = tmp_path / "many"
    with KVStore(many_path, max_bytes=10**12, fsync=False) as many:
        many.put(make_entry(5))
        for shard in range(256):
            (many_path / "v1" / f"{shard:02x}").mkdir(exist_ok=True)
        for number in range(1, count):
            shard = number % 256
            path = many_path / "v1" / f"{shard:02x}" / f"{shard:02x}{number:062x}.safetensors"
            fd = os.open(path, os.O_CREAT | os.O_WRONLY)
            os.truncate(fd, SIZE)  # a sparse file, which takes no space
            os.close(fd)
    (many_path / "index.sqlite").unlink()
    with KVStore(many_path, max_bytes=10**12, fsync=False) as many:
        assert many.stats().index_rebuilds == 1 and len(many) == count

    start = time.perf_counter()
    many = KVStore(many_path, max_bytes=10**12, fsync=False)
    assert len(many) == count
    opened = time.perf_counter() - start
    assert opened < 1

    def median_of_get(store) -> float:
        times = []
        for _ in range(300):
            start = time.perf_counter()
            assert store.get(make_key(5)) is not None
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def median_of_put(store) -> float:
        times = []
        for number in range(30):
            start = time.perf_counter()
            store.put(make_entry(number))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with KVStore(tmp_path / "few", max_bytes=10**12, fsync=False) as few:
        for median in (median_of_get, median_of_put):
            # If the time were linear, it would be ten thousand times as long.
            assert median(many) < 10 * median(few) + 1e-3
    # Eviction finds the oldest entries without reading all rows.
    many.max_bytes = many.stats().bytes
    start = time.perf_counter()
    many.put(make_entry(10**6, tokens=3))
    assert time.perf_counter() - start < 1
    assert 0 < many.stats().evictions < 10
    many.close()
