"""``StoreWriter`` with stores that are slow, hang or fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import weakref
from dataclasses import replace

import pytest
import torch

import voco_model
from tests.voco_model import tiny
from voco_kernels.kv.entry import CompactKV
from voco_model.engine import store_writer
from voco_model.engine.image_job import ImageJob
from voco_model.engine.plan import ImageSlot
from voco_model.engine.store_writer import StoreWriter
from voco_model.kv_store.memory_store import MemoryStore


class Gated(MemoryStore):
    """A store whose puts wait for ``gate`` and are counted by ``begun``."""

    def __init__(self) -> None:
        super().__init__(1 << 26)
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)

    def put(self, entry, key=None):
        self.begun.release()
        assert self.gate.wait(100)
        return super().put(entry, key)


@pytest.fixture(scope="module")
def entry() -> CompactKV:
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with voco_model.enable(model, processor):
        return voco_model.compress(model, [tiny.picture(0)], processor=processor)[0]


def job_of(entry: CompactKV, number: int) -> ImageJob:
    key = f"{number:064x}"
    return ImageJob(key, ImageSlot((), (), ()), entry=replace(entry, key=key), prepared=True)


def test_writes_what_comes_and_ends_its_thread(entry):
    store = MemoryStore(1 << 26)
    writer = StoreWriter(store)
    for round_ in range(3):
        for number in range(4):
            writer.write(job_of(entry, 10 * round_ + number))
        assert writer.flush(timeout=60)
        assert len(store) == 4 * (round_ + 1)
    assert torch.equal(store.get(f"{12:064x}").kv, entry.kv)
    assert writer.close() and writer.failures == 0


def test_drops_entries_if_the_store_is_too_slow(entry, caplog):
    store = Gated()
    writer = StoreWriter(store)
    for number in range(store_writer._MAX_UNWRITTEN + 3):
        writer.write(job_of(entry, number))
    assert writer.failures == 3 and "the store is too slow" in caplog.text
    store.gate.set()
    assert writer.flush(timeout=60) and len(store) == store_writer._MAX_UNWRITTEN


def test_a_flush_without_a_timeout_gives_a_store_up_that_hangs(entry, caplog):
    store = Gated()
    writer = StoreWriter(store)
    for number in range(2):
        writer.write(job_of(entry, number))
    assert not writer.flush(stalled=0.05)
    assert "stopped waiting for 2 entries" in caplog.text
    store.gate.set()
    assert writer.flush(stalled=60) and len(store) == 2


def test_a_flush_without_a_timeout_waits_for_a_store_that_is_slow(entry):
    """As long as something is written now and then: here the entries take longer than ``stalled``
    together, and each less."""
    store = MemoryStore(1 << 26)
    pause, put = threading.Event(), store.put

    def slow_put(entry, key=None):
        pause.wait(0.1)
        return put(entry, key)

    store.put = slow_put
    writer = StoreWriter(store)
    for number in range(8):
        writer.write(job_of(entry, number))
    assert writer.flush(stalled=0.6) and len(store) == 8


def test_closing_drops_what_has_not_begun(entry, caplog):
    store = Gated()
    writer = StoreWriter(store)
    for number in range(3):
        writer.write(job_of(entry, number))
    assert store.begun.acquire(timeout=60)
    assert not writer.close(timeout=0.01)
    assert writer.failures == 2 and "2 entries could not be stored" in caplog.text
    writer.write(job_of(entry, 3))
    assert writer.failures == 3 and "the engine is closed" in caplog.text
    store.gate.set()
    assert writer.flush(timeout=60) and len(store) == 1


def test_a_store_that_raises_costs_that_entry_only(entry, caplog):
    class Panic(BaseException):
        pass

    store = MemoryStore(1 << 26)
    put = store.put

    def some(entry, key=None):
        if entry.key.endswith("1"):
            raise Panic("in the store")
        return put(entry, key)

    store.put = some
    writer = StoreWriter(store)
    for number in range(3):
        writer.write(job_of(entry, number))
    assert writer.flush(timeout=60)
    assert len(store) == 2 and writer.failures == 1 and "in the store" in caplog.text


def test_no_thread_to_be_had(entry, caplog, monkeypatch):
    """The entry is dropped, and the next one tries again."""
    store = MemoryStore(1 << 26)
    writer = StoreWriter(store)

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        writer.write(job_of(entry, 0))
    assert writer.failures == 1 and "can't start new thread" in caplog.text
    writer.write(job_of(entry, 1))
    assert writer.flush(timeout=60) and len(store) == 1


def test_an_interrupt_while_the_thread_is_started(entry, monkeypatch):
    """The entry waits for the next one, or for a flush."""
    store = MemoryStore(1 << 26)
    writer = StoreWriter(store)

    def start(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, "start", start)
        writer.write(job_of(entry, 0))
    assert writer.flush(timeout=60) and len(store) == 1


def test_an_exit_waits_for_a_store_that_hangs_no_longer_than_said(entry, monkeypatch):
    """The function registered with ``atexit``; the thread itself is a daemon."""
    monkeypatch.setattr(store_writer, "_writers", weakref.WeakSet())
    monkeypatch.setattr(store_writer, "_PATIENCE", 0.3)
    good, hanging = MemoryStore(1 << 26), Gated()
    writers = [StoreWriter(good), StoreWriter(hanging)]
    for number in range(3):
        for writer in writers:
            writer.write(job_of(entry, number))
    assert writers[1]._thread.daemon
    store_writer._flush_all()
    assert len(good) == 3 and len(hanging) == 0
    hanging.gate.set()
    assert writers[1].flush(timeout=60)


@pytest.mark.slow  # a process of its own imports Transformers
def test_a_process_exits_with_entries_unwritten(tmp_path):
    """Entries are still written, but a store that hangs doesn't keep the process from exiting."""
    script = """
        import sys, threading, types
        from voco_model.engine import store_writer

        store_writer._PATIENCE = 0.5

        class Slow:
            def put(self, entry):
                threading.Event().wait(0.05)
                with open(sys.argv[1], "a") as file:
                    file.write(entry)

        class Hanging:
            def put(self, entry):
                threading.Event().wait()

        for store in (Slow(), Hanging()):
            writer = store_writer.StoreWriter(store)
            for entry in "abc":
                writer.write(types.SimpleNamespace(entry=entry, key=entry))
    """
    done = tmp_path / "done"
    command = [sys.executable, "-c", textwrap.dedent(script), str(done)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert done.read_text() == "abc"
    assert "stopped waiting for 3 entries" in ended.stderr
