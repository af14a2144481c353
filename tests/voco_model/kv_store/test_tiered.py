from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from tests.voco_model.kv_store.conftest import PATIENT, free_port
from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.base import Store, StoreStats, StoreUnavailable
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.kv_store.redis_store import RedisStore
from voco_model.kv_store.tiered import TieredStore


class Shelf(Store):
    """A durable tier that a test can make fail or wait at a gate, and that records the keys asked
    for."""

    def __init__(self) -> None:
        self.entries = {}
        self.asked: list[list[str]] = []
        self.wrong: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def _pass(self) -> None:
        self.reached.set()
        assert self.gate.wait(PATIENT)
        if self.wrong is not None:
            raise self.wrong

    def put(self, entry, key=None):
        self._pass()
        self.entries[key or entry.key] = entry

    def get(self, key):
        return self.get_many([key])[0]

    def get_many(self, keys):
        self.asked.append(list(keys))
        if self.wrong is not None:
            return [None for _ in keys]
        return [self.entries.get(key) for key in keys]

    def delete(self, key):
        if self.wrong is not None:
            raise self.wrong
        return self.entries.pop(key, None) is not None

    def stats(self):
        return StoreStats(entries=len(self.entries))

    def __contains__(self, key):
        return key in self.entries

    def __iter__(self):
        return iter(list(self.entries))


@pytest.fixture
def memory():
    return MemoryStore(10**6)


@pytest.fixture
def middle():
    return Shelf()


@pytest.fixture
def remote():
    return Shelf()


@pytest.fixture
def store(memory, middle, remote):
    store = TieredStore([memory, middle, remote], close_timeout=PATIENT)
    yield store
    for tier in (middle, remote):
        tier.gate.set()
    store.close()


def test_a_put_reaches_every_tier(store, memory, middle, remote):
    store.put(make_entry(1))
    assert make_key(1) in memory and make_key(1) in middle
    assert store.flush(PATIENT)
    for tier in (memory, middle, remote):
        assert_same(tier.get(make_key(1)), make_entry(1))
    stats = store.stats()
    assert (stats.puts, stats.put_failures, stats.background_failures, stats.waiting) == (
        1,
        0,
        0,
        0,
    )
    assert [tier.entries for tier in stats.tiers] == [1, 1, 1]


def test_a_put_returns_while_the_remote_is_slow(store, middle, remote):
    remote.gate.clear()
    for number in range(3):
        store.put(make_entry(number))
    assert len(middle.entries) == 3 and not remote.entries
    assert store.stats().waiting == 3
    assert not store.flush(0.01)
    remote.gate.set()
    assert store.flush(PATIENT)
    assert len(remote.entries) == 3


def test_a_put_is_acknowledged_when_the_first_durable_tier_has_it(store, memory, middle):
    """Memory alone isn't enough."""
    middle.gate.clear()
    thread = threading.Thread(target=store.put, args=(make_entry(1),))
    thread.start()
    assert middle.reached.wait(PATIENT)
    assert make_key(1) in memory
    assert thread.is_alive()
    middle.gate.set()
    thread.join(PATIENT)
    assert not thread.is_alive()


def test_the_remote_gets_what_was_put_whatever_becomes_of_its_tensors(store, remote):
    remote.gate.clear()
    entry = make_entry(1)
    store.put(entry)
    entry.kv.zero_()
    remote.gate.set()
    assert store.flush(PATIENT)
    assert_same(remote.entries[make_key(1)], make_entry(1))


def test_where_a_tier_fails_the_next_one_acknowledges(store, memory, middle, remote, caplog):
    middle.wrong = OSError(28, "No space left on device")
    store.put(make_entry(1))
    assert make_key(1) in remote
    assert "No space left" in caplog.text
    assert store.stats().puts == 1


def test_where_no_durable_tier_takes_it_the_put_fails(store, memory, middle, remote):
    middle.wrong = OSError(28, "No space left on device")
    remote.wrong = StoreUnavailable("gone")
    with pytest.raises(StoreUnavailable, match="gone"):
        store.put(make_entry(1))
    assert (store.stats().puts, store.stats().put_failures) == (0, 1)


def test_failures_in_the_background_are_counted_and_logged(store, remote, caplog):
    remote.wrong = StoreUnavailable("gone")
    store.put(make_entry(1))
    assert store.flush(PATIENT)
    assert store.stats().background_failures == 1
    assert make_key(1) in caplog.text and "gone" in caplog.text


def test_an_unexpected_error_does_not_end_the_background(store, remote, caplog):
    remote.wrong = RuntimeError("surprise")
    store.put(make_entry(1))
    assert store.flush(PATIENT)
    assert "surprise" in caplog.text and store.stats().background_failures == 1
    remote.wrong = None
    store.put(make_entry(2))
    assert store.flush(PATIENT)
    assert make_key(2) in remote


def test_the_queue_is_bounded(memory, middle, remote, caplog):
    size = make_entry(1).nbytes
    store = TieredStore([memory, middle, remote], max_waiting_bytes=2 * size)
    remote.gate.clear()
    store.put(make_entry(0))
    assert remote.reached.wait(PATIENT)  # the first one is running, and no longer waiting
    for number in range(1, 4):
        store.put(make_entry(number))
    assert "too much waits" in caplog.text
    remote.gate.set()
    assert store.flush(PATIENT)
    assert sorted(remote.entries) == [make_key(number) for number in range(3)]
    assert store.stats().background_failures == 1 and store.stats().puts == 4


def test_a_hit_is_promoted_into_the_tiers_above(store, memory, middle, remote):
    remote.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert make_key(1) in memory
    assert store.flush(PATIENT)
    assert make_key(1) in middle
    assert store.stats().promotions == 2
    remote.asked.clear(), middle.asked.clear()
    assert_same(store.get(make_key(1)), make_entry(1))
    assert not remote.asked and not middle.asked
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.tiers[0].hits, stats.tiers[0].misses) == (2, 0, 1, 1)


def test_each_tier_is_asked_once_for_what_is_missing(store, memory, middle, remote):
    memory.put(make_entry(0))
    middle.put(make_entry(1))
    remote.put(make_entry(2))
    keys = [make_key(number) for number in (3, 2, 1, 0, 2)]
    got = store.get_many(keys)
    assert got[0] is None
    for entry, number in zip(got[1:], (2, 1, 0, 2), strict=True):
        assert_same(entry, make_entry(number))
    assert middle.asked == [[make_key(3), make_key(2), make_key(1)]]
    assert remote.asked == [[make_key(3), make_key(2)]]
    assert (store.stats().hits, store.stats().misses) == (4, 1)


def test_a_slow_tier_does_not_delay_a_hit_above_it(store, memory, middle):
    """Neither does a promotion."""
    middle.gate.clear()
    store.tiers[2].put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert store.stats().tiers[0].hits == 1


def test_a_tier_that_raises_where_it_should_miss(store, middle, remote, monkeypatch, caplog):
    remote.put(make_entry(1))
    monkeypatch.setattr(middle, "get_many", lambda keys: (_ for _ in ()).throw(OSError("no disk")))
    assert_same(store.get(make_key(1)), make_entry(1))
    assert "no disk" in caplog.text and store.stats().failures == {"unreadable": 1}


def test_prefetch_brings_entries_to_the_top(store, memory, middle, remote):
    for number in range(40):
        (remote if number % 2 else middle).put(make_entry(number))
    store.prefetch([make_key(number) for number in range(50)])
    assert store.flush(PATIENT)
    assert sorted(memory) == [make_key(number) for number in range(40)]
    assert max(map(len, remote.asked)) <= 16
    assert (store.stats().hits, store.stats().misses) == (0, 0), "prefetching is no get"
    with pytest.raises(ValueError):
        store.prefetch(["no key"])


def test_delete_reaches_every_tier(store, memory, middle, remote):
    store.put(make_entry(1))
    assert store.flush(PATIENT)
    assert store.delete(make_key(1)) and not store.delete(make_key(1))
    assert not any(make_key(1) in tier for tier in (memory, middle, remote))


def test_delete_overtakes_a_write_in_the_background(store, remote):
    remote.gate.clear()
    store.put(make_entry(0))
    assert remote.reached.wait(PATIENT)
    store.put(make_entry(1))
    store.delete(make_key(1))
    remote.gate.set()
    assert store.flush(PATIENT)
    assert list(remote.entries) == [make_key(0)]


def test_delete_waits_for_a_write_of_its_key_that_has_begun(store, remote):
    remote.gate.clear()
    store.put(make_entry(1))
    assert remote.reached.wait(PATIENT)
    thread = threading.Thread(target=store.delete, args=(make_key(1),))
    thread.start()
    time.sleep(0.02)
    assert thread.is_alive()
    remote.gate.set()
    thread.join(PATIENT)
    assert store.flush(PATIENT)
    assert make_key(1) not in remote and make_key(1) not in store


def test_what_is_deleted_while_it_is_read_is_not_promoted(
    store, memory, middle, remote, monkeypatch
):
    remote.put(make_entry(1))
    read = remote.get_many

    def read_and_lose(keys):
        found = read(keys)
        store.delete(make_key(1))
        return found

    monkeypatch.setattr(remote, "get_many", read_and_lose)
    assert store.get(make_key(1)) is None, "the delete has returned before"
    assert store.flush(PATIENT)
    assert make_key(1) not in memory and make_key(1) not in middle and make_key(1) not in remote


# --- replaced entries

OLD, NEW = make_entry(1), replace(make_entry(2), key=make_key(1))


@pytest.mark.parametrize("slow", ["middle", "remote"])
@pytest.mark.parametrize("how", ["get", "get_many", "prefetch", "load_into"])
def test_what_is_replaced_while_it_is_read_is_neither_served_nor_promoted(
    store, memory, middle, remote, monkeypatch, slow, how
):
    tier = {"middle": middle, "remote": remote}[slow]
    tier.put(OLD)
    read, replaced = threading.Event(), threading.Event()
    get_many = tier.get_many

    def get_slowly(keys):
        found = get_many(keys)
        read.set()
        assert replaced.wait(PATIENT)
        return found

    monkeypatch.setattr(tier, "get_many", get_slowly)
    served = []
    loaded = DynamicCache()
    calls = {
        "get": lambda: served.append(store.get(OLD.key)),
        "get_many": lambda: served.extend(store.get_many([OLD.key, make_key(9)])[:1]),
        "prefetch": lambda: store.prefetch([OLD.key]),
        "load_into": lambda: store.load_into(loaded, [OLD.key]),
    }
    reading = threading.Thread(target=calls[how])
    reading.start()
    assert read.wait(PATIENT)
    store.put(NEW)
    replaced.set()
    reading.join(PATIENT)
    assert store.flush(PATIENT)
    if how == "load_into":
        keys = torch.stack([layer.keys[0] for layer in loaded.layers])
        assert torch.equal(keys, NEW.kv[:, 0])
    for entry in served:
        assert_same(entry, NEW)
    for each in (store, memory, middle, remote):
        assert_same(each.get(OLD.key), NEW)


def test_a_promotion_that_waits_gives_way_to_a_put(store, memory, middle, remote):
    """Also while the same tier is slow with another key."""
    remote.put(OLD)
    remote.put(make_entry(5))
    middle.gate.clear()
    store.get(make_key(5))
    assert middle.reached.wait(PATIENT)  # its promotion is running
    assert_same(store.get(OLD.key), OLD)  # this one's waits
    putting = threading.Thread(target=store.put, args=(NEW,))
    putting.start()
    middle.gate.set()
    putting.join(PATIENT)
    assert store.flush(PATIENT)
    for tier in (memory, middle, remote):
        assert_same(tier.get(OLD.key), NEW)


def test_a_tier_is_not_asked_for_what_is_still_to_be_written_there(store, memory, middle, remote):
    remote.put(OLD)
    remote.gate.clear()
    store.put(NEW)
    for tier in (memory, middle):
        tier.delete(OLD.key)  # as by eviction
    assert store.get(OLD.key) is None
    remote.gate.set()
    assert store.flush(PATIENT)
    assert_same(store.get(OLD.key), NEW)


def test_a_tier_below_that_fails_to_take_an_entry_forgets_the_one_before(
    store, memory, middle, remote, monkeypatch
):
    """Also if it can't delete the entry: then it isn't read until it has stored another one."""
    for deletes in (True, False):
        remote.put(OLD)
        with monkeypatch.context() as patch:
            if deletes:
                patch.setattr(remote, "put", fails(OSError(28, "full")))
            else:
                remote.wrong = StoreUnavailable("gone")
            store.put(NEW)
            assert store.flush(PATIENT)
        remote.wrong = None
        assert (OLD.key in remote) == (not deletes)
        for tier in (memory, middle):
            tier.delete(OLD.key)
        assert store.get(OLD.key) is None
        store.put(NEW)
        assert store.flush(PATIENT)
        for tier in (memory, middle):
            tier.delete(OLD.key)
        assert_same(store.get(OLD.key), NEW)


def test_what_finds_no_room_in_the_queue_is_not_served_from_below(memory, middle, remote):
    store = TieredStore([memory, middle, remote], max_waiting_bytes=1)
    remote.put(OLD)
    remote.gate.clear()
    remote.reached.clear()
    store.put(replace(make_entry(3), key=OLD.key))  # starts to be written there
    assert remote.reached.wait(PATIENT)
    store.put(make_entry(4))  # fills the queue
    store.put(NEW)  # finds no room in the queue
    remote.gate.set()
    assert store.flush(PATIENT)
    for tier in (memory, middle):
        tier.delete(OLD.key)
    assert store.get(OLD.key) is None


@pytest.mark.parametrize("upper", ["memory", "middle"])
def test_a_tier_above_that_refuses_an_entry_forgets_the_one_before(
    store, memory, middle, remote, monkeypatch, upper
):
    store.put(OLD)
    assert store.flush(PATIENT)
    tier = {"memory": memory, "middle": middle}[upper]
    monkeypatch.setattr(tier, "put", fails(ValueError("too large")))
    store.put(NEW)
    assert store.flush(PATIENT)
    memory.delete(OLD.key)
    assert_same(store.get(OLD.key), NEW)


def test_a_put_that_failed_does_not_come_and_go(store, memory, middle, remote):
    """An entry that only memory has stored: after its eviction, the previous one isn't served."""
    store.put(OLD)
    assert store.flush(PATIENT)
    middle.wrong = remote.wrong = OSError(28, "full")
    with pytest.raises(OSError, match="full"):
        store.put(NEW)
    assert_same(store.get(OLD.key), NEW)
    middle.wrong = remote.wrong = None
    memory.delete(OLD.key)
    assert store.get(OLD.key) is None
    store.put(OLD)
    memory.delete(OLD.key)
    assert_same(store.get(OLD.key), OLD)


def test_puts_of_one_key_leave_all_tiers_alike(store, memory, middle, remote):
    entries = [replace(make_entry(number), key=OLD.key) for number in range(12)]
    threads = [threading.Thread(target=store.put, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    assert store.flush(PATIENT)
    assert_same(middle.get(OLD.key), memory.get(OLD.key))
    assert_same(remote.get(OLD.key), memory.get(OLD.key))


def test_a_child_does_not_ask_for_what_its_parent_is_still_to_write(store, memory, middle, remote):
    remote.put(OLD)
    remote.gate.clear()
    store.put(NEW)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for tier in (memory, middle):
                tier.delete(OLD.key)
            status = 0 if store.get(OLD.key) is None else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    remote.gate.set()
    assert store.flush(PATIENT)
    assert_same(remote.get(OLD.key), NEW)


def test_tiers_for_a_model_serve_no_other_one_s(tmp_path, caplog):
    disk = KVStore(tmp_path, max_bytes=10**6, fsync=False)
    store = TieredStore([MemoryStore(10**6, fingerprint="model-b"), disk])
    disk.put(OLD)  # of model-a
    assert store.get(OLD.key) is None
    assert store.stats().failures == {"model": 1} and "model-a" in caplog.text
    with pytest.raises(ValueError, match="expected an entry of the model"):
        store.put(NEW)
    assert_same(disk.get(OLD.key), OLD)
    with pytest.raises(ValueError, match="expected tiers for one model"):
        TieredStore([MemoryStore(1, fingerprint="a"), MemoryStore(1, fingerprint="b")])


def fails(error):
    def put(*_):
        raise error

    return put


def test_delete_says_where_it_could_not(store, memory, middle, remote):
    store.put(make_entry(1))
    assert store.flush(PATIENT)
    remote.wrong = StoreUnavailable("gone")
    with pytest.raises(StoreUnavailable, match="gone"):
        store.delete(make_key(1))
    assert make_key(1) not in memory and make_key(1) not in middle


def test_iteration_and_membership(store, memory, middle, remote):
    memory.put(make_entry(0))
    for number in (0, 1):
        middle.put(make_entry(number))
    remote.put(make_entry(2))
    assert sorted(store) == [make_key(number) for number in range(3)] and len(store) == 3
    assert make_key(2) in store and make_key(3) not in store


def test_verify_reports_every_tier(tmp_path, memory, middle):
    """``Shelf`` has the interface's own ``verify``, which goes through ``get``."""
    disk = KVStore(tmp_path, max_bytes="1MB", fsync=False)
    with TieredStore([memory, disk, middle], max_waiting_bytes="1 MiB") as store:
        for number in range(3):
            store.put(make_entry(number))
        assert store.flush(PATIENT)
        memory.get(make_key(0)).kv.zero_()
        path = tmp_path / "v1" / "00" / f"{make_key(1)}.safetensors"
        path.write_bytes(b"bad")
        middle.entries[make_key(2)] = None
        report = store.verify()
        assert report.bad == {
            make_key(0): "overwritten",
            make_key(1): "truncated",
            make_key(2): "unreadable",
        }
        assert [tier.entries for tier in report.tiers] == [2, 2, 2] and report.entries == 6
        assert [list(tier.bad) for tier in report.tiers] == [[make_key(n)] for n in range(3)]
        assert report.dropped == [] and not report.ok


def test_memory_alone():
    with TieredStore([MemoryStore(10**6)]) as store:
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
        with pytest.raises(ValueError, match="max_bytes"):
            store.put(make_entry(2, tokens=100, layers=100))


def test_arguments_that_do_not_fit(store):
    with pytest.raises(ValueError, match="at least one tier"):
        TieredStore([])
    with pytest.raises(TypeError, match="got str"):
        TieredStore(["redis://localhost"])
    with pytest.raises(TypeError, match="CompactKV"):
        store.put("entry")
    with pytest.raises(ValueError, match="64"):
        store.get("short")


def test_close_says_what_it_left_undone(memory, middle, remote, caplog):
    store = TieredStore([memory, middle, remote], close_timeout=0.05)
    remote.gate.clear()
    for number in range(3):
        store.put(make_entry(number))
    assert remote.reached.wait(PATIENT)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < PATIENT / 2
    assert "2 jobs left undone" in caplog.text
    assert store.stats().background_failures == 2
    remote.gate.set()


def test_the_interpreter_exits_with_a_write_that_hangs():
    code = """
import logging, sys, threading
from tests.voco_model.kv_store.samples import make_entry
from tests.voco_model.kv_store.test_tiered import Shelf
from voco_model.kv_store import background, tiered
background._EXIT_SECONDS = 0.2
logging.basicConfig()
shelf, remote = Shelf(), Shelf()
remote.gate.clear()
store = tiered.TieredStore([shelf, remote])
store.put(make_entry(1))
store.put(make_entry(2))
remote.reached.wait(10)
print("put")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=2 * PATIENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "put\n", done.stderr
    assert "1 jobs left undone" in done.stderr


def test_the_interpreter_exits_when_the_background_is_done(tmp_path):
    code = f"""
from tests.voco_model.kv_store.samples import make_entry
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.tiered import TieredStore
store = TieredStore([KVStore({str(tmp_path / "a")!r}, max_bytes=10**6),
                     KVStore({str(tmp_path / "b")!r}, max_bytes=10**6)])
for number in range(20):
    store.put(make_entry(number))
"""
    subprocess.run([sys.executable, "-c", code], timeout=2 * PATIENT, check=True)
    with KVStore(tmp_path / "b", max_bytes=10**6) as below:
        assert len(below) == 20


# --- memory, disk and Redis


def test_memory_disk_and_redis(tmp_path, redis_server):
    def open_store():
        disk = KVStore(tmp_path / "store", max_bytes=10**7)
        return TieredStore(
            [MemoryStore(10**6), disk, RedisStore(redis_server.url, timeout=PATIENT)]
        )

    entries = [make_entry(number) for number in range(10)]
    with open_store() as store:
        for entry in entries:
            store.put(entry)
    with open_store() as store:
        disk = store.tiers[1]
        for entry in entries[:5]:
            disk.delete(entry.key)
        for entry, got in zip(entries, store.get_many([e.key for e in entries]), strict=True):
            assert_same(got, entry)
        assert store.flush(PATIENT)
        assert len(disk) == 10 and len(store.tiers[0]) == 10
        assert [tier.hits for tier in store.stats().tiers] == [0, 5, 5]
        redis_server.kill()
        for entry in entries:
            assert_same(store.get(entry.key), entry)
        assert store.get(make_key(99)) is None
        store.put(make_entry(11))
        assert store.flush(PATIENT)
        assert store.stats().background_failures == 1
        with store.hold(make_key(11)) as there:
            assert there


def test_a_remote_that_is_down_costs_a_miss_its_time_once(tmp_path):
    remote = RedisStore(f"redis://127.0.0.1:{free_port()}", timeout=PATIENT, back_off=(1000, 1000))
    with TieredStore([KVStore(tmp_path, max_bytes=10**6), remote]) as store:
        for number in range(20):
            assert store.get(make_key(number)) is None
        assert store.stats().tiers[1].failures == {"unavailable": 1, "backing off": 19}
