"""Stores while another process is stopped, and after a fork: no call hangs or undoes another's."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.voco_model.kv_store.conftest import PATIENT
from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from tests.voco_model.kv_store.test_disk import SIZE, check_consistent, file_of, held, spoil
from voco_model.kv_store.base import StoreUnavailable
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.locks import alone
from voco_model.kv_store.memory_store import MemoryStore

TIMEOUT = 0.3  # seconds that a store waits for a lock in these tests


def open_store(path: Path, entries: int = 1000, **options) -> KVStore:
    return KVStore(path, max_bytes=entries * SIZE, fsync=False, **options)


# A process that locks a given file. It doesn't import this package, which would take seconds.
LOCKER = """
import fcntl, os, sqlite3, sys
kind, path = sys.argv[1:]
if kind == "index":
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
else:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def stopped_with(kind: str, path: Path):
    """Context in which another process holds a lock and is stopped."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", LOCKER, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"locked\n"
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        process.kill()
        process.communicate()


LOCKS = {
    "index": ("index", "index.sqlite"),
    "files": ("file", "files.lock"),
    "entry": ("file", f"v1/00/{make_key(0)}.safetensors"),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_stopped_process_costs_a_miss_or_an_error(tmp_path, lock):
    """A reader doesn't wait at all."""
    with open_store(tmp_path, 3, index_timeout=TIMEOUT) as store:
        for number in range(3):
            store.put(make_entry(number))
        spoil(file_of(store, 1), -1)
        kind, name = LOCKS[lock]
        with stopped_with(kind, tmp_path / name):
            began = time.monotonic()
            assert_same(store.get(make_key(2)), make_entry(2))
            assert store.get(make_key(1)) is None
            assert store.get(make_key(9)) is None
            store.load_into(object(), [make_key(9)])
            if lock == "entry":
                store.put(make_entry(3))  # replaces another one
            else:
                with pytest.raises(StoreUnavailable, match="index.sqlite|files.lock"):
                    store.put(make_entry(3))
            if lock == "index":
                with pytest.raises(StoreUnavailable):
                    store.delete(make_key(0))
            with open_store(tmp_path, 3, index_timeout=TIMEOUT) as another:
                assert_same(another.get(make_key(2)), make_entry(2))
            assert time.monotonic() - began < PATIENT
        assert store.get(make_key(1)) is None
        store.put(make_entry(4))
        assert_same(store.get(make_key(4)), make_entry(4))
        store.verify()
        check_consistent(store)


def test_an_index_that_a_stopped_process_makes_is_not_waited_for(tmp_path):
    with open_store(tmp_path, index_timeout=TIMEOUT) as store:
        store.put(make_entry(1))
        (tmp_path / "index.sqlite").unlink()
        with stopped_with("file", tmp_path / "index.lock"):
            with pytest.raises(StoreUnavailable, match="index.lock"):
                store.put(make_entry(2))
            assert_same(store.get(make_key(1)), make_entry(1))
            with open_store(tmp_path, index_timeout=TIMEOUT) as another:
                assert_same(another.get(make_key(1)), make_entry(1))
        store.put(make_entry(2))
        check_consistent(store)


def test_a_thread_that_keeps_the_index_is_not_waited_for(tmp_path):
    entered, leave = threading.Event(), threading.Event()
    with open_store(tmp_path, index_timeout=TIMEOUT) as store:
        thread = threading.Thread(
            target=store._index.change, args=(lambda _: (entered.set(), leave.wait(PATIENT)),)
        )
        thread.start()
        assert entered.wait(PATIENT)
        with pytest.raises(StoreUnavailable, match="other threads"):
            store.put(make_entry(1))
        leave.set()
        thread.join(PATIENT)
        store.put(make_entry(1))


# --- forks


def in_child(do) -> int:
    """The result of ``do`` in a forked child; 99 if it raises, -1 if it doesn't end."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = int(do() or 0)
        finally:
            os._exit(status)
    end = time.monotonic() + PATIENT
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@contextmanager
def another_thread(do):
    """Context in which ``do(entered, leave)`` runs in a thread and has set ``entered``."""
    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=do, args=(entered, leave))
    thread.start()
    assert entered.wait(PATIENT)
    try:
        yield
    finally:
        leave.set()
        thread.join(PATIENT)
        assert not thread.is_alive()


def may_lock(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def test_a_hold_of_the_parent_s_outlives_the_child_s_and_the_other_way_round(tmp_path):
    with open_store(tmp_path) as store:
        store.put(make_entry(1))
        path = file_of(store, 1)
        for kind in (store.hold, store.reader):
            context = kind(make_key(1))
            there = context.__enter__()
            assert there
            assert in_child(lambda context=context: context.__exit__(None, None, None)) == 0
            assert not may_lock(path), "the child has ended the parent's hold"
            told, tell = os.pipe()
            end, ended = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(tell, b"!")
                os.close(ended)
                os.read(end, 1)
                os._exit(0)
            os.read(told, 1)
            if kind == store.reader:
                list(there.layers())
            context.__exit__(None, None, None)
            if os.path.exists("/proc/self/fd"):
                assert not may_lock(path), "the parent has ended the child's hold"
            os.close(ended)
            os.waitpid(child, 0)
            assert may_lock(path)
            for fd in (told, tell, end):
                os.close(fd)


def test_a_lock_that_a_thread_had_at_the_fork_is_not_the_child_s(tmp_path):
    """A killed parent doesn't leave the lock behind, and the child doesn't release it."""
    path = tmp_path / "files.lock"

    def hold(entered, leave):
        with alone(path, timeout=PATIENT):
            entered.set()
            leave.wait(PATIENT)

    def is_mine() -> bool:
        return any(
            os.path.realpath(f"/proc/self/fd/{fd}") == str(path)
            for fd in os.listdir("/proc/self/fd")
        )

    with another_thread(hold):
        if os.path.exists("/proc/self/fd"):
            assert in_child(is_mine) == 0
        assert not may_lock(path)
    assert may_lock(path)


@pytest.mark.parametrize("collected", [False, True])
def test_a_change_under_way_at_the_fork_is_not_undone(tmp_path, collected):
    """The fork waits for a running change, so that the child doesn't see half of it."""
    store = open_store(tmp_path)
    store.put(make_entry(1))
    state = [store]
    del store

    def change(entered, leave):
        def do(transaction):
            transaction.put(make_key(7), 700, 7)
            entered.set()
            leave.wait(0.3)
            transaction.put(make_key(8), 800, 8)

        state[0]._index.change(do)

    def child() -> int:
        if collected:
            state.clear()
            gc.collect()
            return 0
        state[0].put(make_entry(2))
        return 0 if held(state[0]) == {1, 2, 7, 8} else 3

    with another_thread(change):
        assert in_child(child) == 0
    (store,) = state
    assert held(store) == ({1, 7, 8} if collected else {1, 2, 7, 8})
    store.verify()
    check_consistent(store)
    store.close()


def test_a_change_that_outlasts_the_fork_s_patience_is_an_error_in_the_child(tmp_path, monkeypatch):
    monkeypatch.setattr("voco_model.kv_store.index._FORK_PATIENCE", 0.05)
    with open_store(tmp_path, index_timeout=5.0) as store:
        store.put(make_entry(1))

        def change(entered, leave):
            store._index.change(lambda _: (entered.set(), leave.wait(PATIENT)))

        def child() -> int:
            assert_same(store.get(make_key(1)), make_entry(1))
            with pytest.raises(StoreUnavailable, match="forked while another thread"):
                store.put(make_entry(2))
            return 0

        with another_thread(change):
            assert in_child(child) == 0
        store.put(make_entry(3))
        assert held(store) == {1, 3}


@pytest.mark.parametrize("lock", ["_tally._lock", "_clock._lock", "buffers._lock"])
def test_a_lock_of_another_thread_at_the_fork_is_free_in_the_child(tmp_path, lock):
    with open_store(tmp_path) as store:
        owner, name = lock.split(".")

        def hold(entered, leave):
            with getattr(getattr(store, owner), name):
                entered.set()
                leave.wait(PATIENT)

        def child() -> None:
            store.put(make_entry(1))
            assert_same(store.get(make_key(1)), make_entry(1))

        with another_thread(hold):
            assert in_child(child) == 0
        assert_same(store.get(make_key(1)), make_entry(1))


def test_memory_that_a_thread_was_changing_at_the_fork_adds_up_in_the_child():
    store = MemoryStore(10**6)
    for number in range(3):
        store.put(make_entry(number))
    nbytes = store.stats().bytes

    def change(entered, leave):
        with store._lock:
            store._bytes += 10**6
            entered.set()
            leave.wait(PATIENT)
            store._bytes -= 10**6

    def child() -> None:
        assert store.stats().bytes == nbytes
        store.put(make_entry(4))
        assert len(store) == 4

    with another_thread(change):
        assert in_child(child) == 0
    assert len(store) == 3
