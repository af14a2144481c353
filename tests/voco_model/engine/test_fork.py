"""An engine in a process forked from the one that made it."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import voco_model
from tests.support.forks import in_child, needs_fork
from tests.voco_model.engine.conftest import SHORT
from voco_model import Request
from voco_model.kv_store.memory_store import MemoryStore

pytestmark = needs_fork


class PausingStore(MemoryStore):
    """Its ``get`` blocks in a given process for a given key."""

    def __init__(self) -> None:
        super().__init__(1 << 26)
        self.process, self.key = os.getpid(), ""
        self.reached, self.go_on = threading.Event(), threading.Event()

    def get(self, key):
        if key == self.key and os.getpid() == self.process:
            self.reached.set()
            assert self.go_on.wait(100)
        return super().get(key)


def test_the_child_answers_and_its_entries_are_written(world, engine_of, tmp_path):
    """Even if the parent's writer is in the middle of a put."""
    before, after = world.cases[0], world.cases[2]
    with voco_model.KVStore(tmp_path, max_bytes=10**8, fsync=False) as store:
        engine = engine_of(store)
        assert engine.submit(before.request).result().tokens == before.tokens
        assert engine.flush(timeout=60)

        def child() -> None:
            assert engine.submit(before.request).result(timeout=30).from_store == 1
            assert engine.submit(after.request).result(timeout=30).tokens == after.tokens
            assert engine.flush(timeout=30)
            assert len(store) == 2 and engine.stats().put_failures == 0
            assert engine.close(timeout=30)

        in_child(child)
        assert engine.submit(after.request).result().from_store == 1
        assert engine.flush(timeout=60)


def test_what_was_being_written_is_written_by_the_parent(world, engine_of):
    release, begun = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def put(self, entry, key=None):
            begun.set()
            assert release.wait(100)
            return super().put(entry, key)

    store = Slow(1 << 26)
    engine = engine_of(store)
    engine.submit(world.cases[0].request).result()
    assert begun.wait(60)

    def child() -> None:
        assert engine.flush(timeout=30) and engine.close(timeout=30)
        assert len(store) == 0 and engine.stats().put_failures == 0

    try:
        in_child(child)
    finally:
        release.set()
    assert engine.flush(timeout=60) and len(store) == 1


def test_open_requests_are_the_parents(world, engine_of):
    engine = engine_of(max_batch=1)
    running, waiting = (engine.submit(case.request) for case in world.cases[:2])
    engine.step()

    def child() -> None:
        for ticket in (running, waiting):
            error = ticket.wait(timeout=30).error
            assert error.reason == "interrupted" and "the process was forked" in str(error)
        assert engine.submit(world.cases[2].request).result(30).tokens == world.cases[2].tokens
        assert engine.answer(world.cases[0].request.images, world.cases[0].request.text).tokens

    in_child(child)
    assert [each.result().tokens for each in (running, waiting)] == [
        case.tokens for case in world.cases[:2]
    ]


def test_another_thread_holds_every_lock(world, engine_of, monkeypatch):
    """Another thread is in a step, and holds the locks of images, counters and writer."""
    store = MemoryStore(1 << 26)
    engine = engine_of(store)
    engine.submit(world.cases[0].request).result()
    assert engine.flush(timeout=60)
    inside, release = threading.Event(), threading.Event()
    real, parent = engine._second.step, os.getpid()

    def step() -> bool:
        if os.getpid() == parent:
            with (
                engine._images._lock,
                engine._images._writer._lock,
                engine._scheduler._counting,
            ):
                inside.set()
                assert release.wait(100)
        return real()

    monkeypatch.setattr(engine._second, "step", step)
    ticket = engine.submit(world.cases[1].request)
    thread = threading.Thread(target=ticket.wait)
    thread.start()
    assert inside.wait(60)

    def child() -> None:
        assert ticket.wait(timeout=30).error.reason == "interrupted"
        assert engine.submit(world.cases[2].request).result(30).tokens == world.cases[2].tokens
        assert engine.flush(30) and len(store) == 2 and engine.stats().answered == 2
        assert engine.close(30)

    try:
        in_child(child)
    finally:
        release.set()
    thread.join(60)
    assert ticket.result().tokens == world.cases[1].tokens


def test_an_image_that_a_thread_of_the_parent_is_preparing(world, engine_of):
    """The child doesn't wait for that thread, nor does the parent for the child."""
    store, request, tokens = PausingStore(), world.cases[0].request, world.cases[0].tokens
    engine = engine_of(store)
    store.key = "e" * 64
    asked = Request(request.images, request.text, keys=[store.key])
    tickets: list = []
    thread = threading.Thread(target=lambda: tickets.append(engine.submit(asked)))
    thread.start()
    assert store.reached.wait(60)

    def child() -> None:
        assert engine.submit(asked).result(timeout=30).tokens == tokens

    try:
        in_child(child)
    finally:
        store.go_on.set()
    thread.join(60)
    assert tickets[0].result(timeout=60).tokens == tokens


def test_torch_has_one_thread_in_the_child(world, engine_of, caplog):
    """OpenMP's threads don't exist in the child, where the first large operator would wait forever."""
    engine, before = engine_of(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).relu()  # starts OpenMP's threads

        def child() -> None:
            engine.answer(world.cases[0].request.images, SHORT)
            torch.randn(1000, 1000).relu()
            assert torch.get_num_threads() == 1 and "torch runs on one thread" in caplog.text

        in_child(child, seconds=30)
    finally:
        torch.set_num_threads(before)


def test_a_device_that_a_child_cannot_use(world, engine_of, monkeypatch):
    engine = engine_of()
    ticket = engine.submit(world.cases[0].request)
    monkeypatch.setattr(engine._scheduler, "_device", torch.device("cuda"))

    def child() -> None:
        for call in (
            engine.step,
            lambda: engine.submit(world.cases[0].request),
            lambda: engine.compress(world.cases[0].request.images),
            engine.warmup,
        ):
            with pytest.raises(RuntimeError, match="on cuda from before a fork"):
                call()
        assert ticket.wait(timeout=30).error.reason == "interrupted"
        assert engine.flush(timeout=30) and engine.close(timeout=30)

    in_child(child)
    assert ticket.result().tokens == world.cases[0].tokens


def test_a_child_of_a_child(world, engine_of):
    engine = engine_of(MemoryStore(1 << 26))

    def child() -> None:
        engine.submit(world.cases[0].request).result(timeout=30)
        in_child(grandchild)

    def grandchild() -> None:
        assert engine.submit(world.cases[2].request).result(30).tokens == world.cases[2].tokens
        assert engine.close(timeout=30)

    in_child(child)
