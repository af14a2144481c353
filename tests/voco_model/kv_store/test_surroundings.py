"""``KVStore`` and its environment: removed files, clocks, full disks, many files, links, other
models."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from tests.voco_model.kv_store.test_disk import SIZE, check_consistent, file_of, files, held, spoil
from voco_model.kv_store import disk, loading
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.use_clock import UseClock

DAY = 86_400 * 10**9  # nanoseconds


def open_store(path: Path, entries: int = 1000, **options) -> KVStore:
    return KVStore(path, max_bytes=entries * SIZE, fsync=False, **options)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "store") as store:
        yield store


# --- removed files

CLEANED = {
    "tmp": ["tmp"],
    "entries": ["v1"],
    "a shard": ["v1/00"],
    "quarantine": ["quarantine"],
    "index": ["index.sqlite"],
    "locks": ["index.lock", "files.lock"],
    "clock": ["clock"],
    "all": ["."],
}


@pytest.mark.parametrize("what", CLEANED)
@pytest.mark.parametrize("call", ["put", "get", "get of a bad one", "delete", "verify", "stats"])
def test_what_is_cleaned_away_is_made_again(store, what, call, caplog):
    for number in range(3):
        store.put(make_entry(number))
    if call == "get of a bad one":
        spoil(file_of(store, 1), -1)
    for name in CLEANED[what]:
        path = store.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    calls = {
        "put": lambda: store.put(make_entry(1)),
        "get": lambda: store.get(make_key(1)),
        "get of a bad one": lambda: store.get(make_key(1)),
        "delete": lambda: store.delete(make_key(1)),
        "verify": store.verify,
        "stats": store.stats,
    }
    calls[call]()
    for number in range(5, 8):
        store.put(make_entry(number))
        assert_same(store.get(make_key(number)), make_entry(number))
    spoil(file_of(store, 7), -1)
    assert store.get(make_key(7)) is None
    assert len(files(store, "quarantine")) >= 1
    store.verify()
    check_consistent(store)
    assert store.stats().put_failures == 0
    told = [r for r in caplog.records if "removed while the store was open" in r.getMessage()]
    assert len(told) <= 3  # each folder is logged once
    if what == "tmp":
        assert len(told) == 1


def test_a_journal_that_is_cleaned_away_in_a_change_loses_no_entry(store):
    for number in range(3):
        store.put(make_entry(number))

    def lose_the_journal(transaction):
        transaction.delete(make_key(0))
        for path in store.path.glob("index.sqlite-*"):
            path.unlink()

    with pytest.raises(OSError, match="index.sqlite"):
        store._index.change(lose_the_journal)
    store.put(make_entry(5))
    store.verify()
    check_consistent(store)
    assert held(store) == {0, 1, 2, 5}


def test_a_folder_that_cannot_be_made_again_is_an_error_of_each_put(store, monkeypatch):
    shutil.rmtree(store.path / "tmp")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    for _ in range(2):
        with pytest.raises(PermissionError):
            store.put(make_entry(1))
    assert store.stats().put_failures == 2


def test_a_lock_file_that_is_replaced_while_it_is_waited_for_is_opened_anew(tmp_path):
    from voco_model.kv_store.locks import alone

    path = tmp_path / "lock"
    with alone(path, timeout=0):
        path.unlink()
        with alone(path, timeout=0):  # the file that is there now
            assert path.exists()


# --- clocks


@pytest.fixture
def system_clock(monkeypatch):
    """An offset in nanoseconds of the system's clock, set by a test."""
    ahead = [0]
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + ahead[0])
    return ahead


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("without", ["nothing", "clock", "index"])
def test_a_clock_that_was_ahead_does_not_turn_eviction_round(
    tmp_path, system_clock, reopened, without
):
    system_clock[0] = DAY
    store = open_store(tmp_path, 3)
    for number in range(3):
        store.put(make_entry(number))
    system_clock[0] = 0
    if reopened:
        store.close()
        if without != "nothing":
            (tmp_path / {"clock": "clock", "index": "index.sqlite"}[without]).unlink()
        store = open_store(tmp_path, 3)
    assert store.get(make_key(0)) is not None  # used after 1 and 2
    store.put(make_entry(3))
    assert held(store) == {0, 2, 3}
    store.put(make_entry(4))
    assert held(store) == {0, 3, 4}
    store.close()


def test_processes_with_other_clocks_agree_on_what_was_used_last(tmp_path, system_clock):
    """A clock that is a day ahead and a correct one, with a handle each, in turn."""
    with open_store(tmp_path, 4) as ahead, open_store(tmp_path, 4) as right:
        for number in range(4):
            system_clock[0] = DAY
            ahead.put(make_entry(number))
        system_clock[0] = 0
        for number in (0, 1):
            assert right.get(make_key(number)) is not None
        system_clock[0] = DAY
        ahead.put(make_entry(4))
        ahead.put(make_entry(5))
        assert held(ahead) == {0, 1, 4, 5}
        check_consistent(right)


def test_the_clock_only_rises_and_at_the_usual_speed(tmp_path, system_clock, monkeypatch):
    now = [10 * DAY]
    monkeypatch.setattr(time, "time_ns", lambda: now[0])
    one, other = UseClock(tmp_path / "clock"), UseClock(tmp_path / "clock")
    times = [one.now(), one.now()]
    assert times == [10 * DAY, 10 * DAY + 1]
    now[0] = 9 * DAY
    times += [other.now(), one.now()]
    assert times[2:] == [10 * DAY + 2, 10 * DAY + 3]
    now[0] += 5 * 10**9
    times = [other.now(), one.now()]
    assert times[0] == pytest.approx(10 * DAY + 5 * 10**9, abs=10) and times[1] > times[0]
    now[0] = 11 * DAY
    assert one.now() == 11 * DAY  # the system's clock has caught up
    one.observe(12 * DAY)
    assert one.now() > 12 * DAY


def test_what_was_set_aside_last_is_kept_longest_whatever_the_clock_says(tmp_path, system_clock):
    with open_store(tmp_path, quarantine_bytes=2 * SIZE) as store:
        for number, ahead in enumerate([2 * DAY, DAY, 0]):
            system_clock[0] = ahead
            store.put(make_entry(number))
            spoil(file_of(store, number), -1)
            assert store.get(make_key(number)) is None
        kept = {path.name.split(".")[0] for path in files(store, "quarantine")}
        assert kept == {make_key(1), make_key(2)}


# --- a full disk, in every way


def run_out(monkeypatch, store: KVStore, name: str, code: int, times: int):
    """Makes ``os.<name>`` fail ``times`` times when it creates files in the store."""
    original = getattr(os, name)
    left = [times]

    def fail(path, *arguments, **options):
        creates = name != "open" or arguments[0] & os.O_CREAT
        if left[0] and creates and str(path).startswith(f"{store.path}{os.sep}tmp"):
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["inodes", "quota"])
@pytest.mark.parametrize("name", ["open", "rename"])
def test_room_is_made_where_no_file_can_be_made(store, monkeypatch, code, name):
    for number in range(30):
        store.put(make_entry(number))
    with monkeypatch.context() as patch:
        run_out(patch, store, name, code, times=1)
        store.put(make_entry(100))
    assert store.stats().evictions > 0
    assert_same(store.get(make_key(100)), make_entry(100))
    with monkeypatch.context() as patch:
        run_out(patch, store, name, code, times=100)
        with pytest.raises(OSError) as failed:
            store.put(make_entry(101))
    assert failed.value.errno == code
    assert not files(store, "tmp") and make_key(101) not in store
    assert store.verify().bad == {}
    check_consistent(store)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_an_index_that_cannot_be_written_says_why(store, monkeypatch, code):
    """SQLite reports "disk I/O error" or "unable to open database file" for all of these."""
    for number in range(30):
        store.put(make_entry(number))
    left = [1]

    def fail(transaction):
        if left[0]:
            left[0] -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return enter(transaction)

    def change(do):
        nonlocal enter
        enter = do
        return original(fail)

    enter, original = None, store._index.change
    monkeypatch.setattr(store._index, "change", change)
    monkeypatch.setattr(
        "voco_model.kv_store.index._why_not_written", lambda folder: OSError(code, "full")
    )
    store.put(make_entry(100))
    assert_same(store.get(make_key(100)), make_entry(100))
    assert store.stats().evictions > 0


@pytest.fixture
def few_inodes(tmp_path):
    """A file system with room for 40 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=40", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a tmpfs here; inodes that run out by monkeypatch do anywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_out_of_inodes(few_inodes):
    with KVStore(few_inodes, max_bytes=10**9) as store:
        for number in range(100):
            store.put(make_entry(number))
            assert_same(store.get(make_key(number)), make_entry(number))
        stats = store.stats()
        assert (stats.puts, stats.put_failures) == (100, 0) and stats.evictions > 50
        assert not files(store, "tmp")
        check_consistent(store)


# --- many files


@pytest.fixture
def few_files():
    """Limits open files to 20 more than are open now."""
    used = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_more_entries_than_files_that_may_be_open(store, monkeypatch, few_files):
    monkeypatch.setattr(disk, "STREAMED_FROM", 0)
    keys = [make_key(number) for number in range(60)]
    for number in range(60):
        store.put(make_entry(number))
    cache = DynamicCache()
    assert store.load_into(cache, keys) == []
    got = torch.stack([layer.keys for layer in cache.layers])
    for number in range(60):
        assert torch.equal(got[:, number], make_entry(number).kv[:, 0])
    assert None not in store.get_many(keys)
    assert store.verify().ok
    assert store.stats().hits == 120


@pytest.mark.parametrize("other", [make_entry(2), make_entry(2, tokens=2), None])
def test_an_entry_that_is_replaced_between_the_looks_at_it(store, monkeypatch, other):
    """A replacement that fits is loaded; one that doesn't fit, or none, is missing."""
    monkeypatch.setattr(disk, "STREAMED_FROM", 0)
    store.put(make_entry(1))
    prepare = loading.prepare_load

    def replace(*arguments, **options):
        store.delete(make_key(1)) if other is None else store.put(other, make_key(1))
        return prepare(*arguments, **options)

    monkeypatch.setattr(loading, "prepare_load", replace)
    cache = DynamicCache()
    fits = other is not None and other.num_tokens == 1
    assert store.load_into(cache, [make_key(1)]) == ([] if fits else [make_key(1)])
    if fits:
        assert torch.equal(cache.layers[0].keys[0], other.kv[0, 0])
    else:
        assert cache.get_seq_length() == 0


# --- other models' entries, and links


@pytest.mark.parametrize("how", ["get", "get_many", "reader", "load_into", "verify"])
def test_another_model_s_entry_is_left_where_it_is(tmp_path, monkeypatch, how):
    monkeypatch.setattr(disk, "STREAMED_FROM", 0)
    with (
        open_store(tmp_path, fingerprint="model-a") as ours,
        open_store(tmp_path, fingerprint="model-b") as theirs,
    ):
        ours.put(make_entry(1))
        if how == "get":
            assert theirs.get(make_key(1)) is None
        elif how == "get_many":
            assert theirs.get_many([make_key(1)]) == [None]
        elif how == "reader":
            with theirs.reader(make_key(1)) as reader:
                assert reader is None
        elif how == "load_into":
            assert theirs.load_into(DynamicCache(), [make_key(1)]) == [make_key(1)]
        else:
            assert theirs.verify().ok
        assert theirs.stats().failures == ({} if how == "verify" else {"model": 1})
        assert theirs.stats().quarantined == 0
        assert_same(ours.get(make_key(1)), make_entry(1))


@pytest.mark.parametrize("how", ["get", "reader", "verify"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_an_entry_is_set_aside(store, tmp_path, how, dangling, caplog):
    store.put(make_entry(1))
    target = tmp_path / "target"
    os.rename(file_of(store, 1), target)
    file_of(store, 1).symlink_to(tmp_path / "nowhere" if dangling else target)
    assert make_key(1) in store
    if how == "get":
        assert store.get(make_key(1)) is None
    elif how == "reader":
        with store.reader(make_key(1)) as reader:
            assert reader is None
    else:
        assert store.verify().bad == {make_key(1): "foreign"}
    assert store.stats().failures == {"foreign": 1} and "symbolic link" in caplog.text
    assert make_key(1) not in store and target.exists()
    assert [path.is_symlink() for path in (store.path / "quarantine").iterdir()] == [True]
    check_consistent(store)
    store.put(make_entry(1))
    assert_same(store.get(make_key(1)), make_entry(1))


def test_a_link_is_evicted_like_any_other(tmp_path):
    with open_store(tmp_path / "store", 2) as store:
        for number in range(2):
            store.put(make_entry(number))
        target = tmp_path / "target"
        os.rename(file_of(store, 0), target)
        file_of(store, 0).symlink_to(target)
        for number in (2, 3):
            store.put(make_entry(number))
        assert held(store) == {2, 3} and not file_of(store, 0).is_symlink()
        assert target.exists()
        check_consistent(store)


def test_a_folder_of_entries_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "v1").symlink_to(tmp_path / "elsewhere")
    with open_store(tmp_path / "store") as store:
        store.put(make_entry(1))
        assert_same(store.get(make_key(1)), make_entry(1))
        assert store.verify().ok
