"""Waiting for answers: timeouts, cancellation, several threads."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from voco_model import RequestError


@pytest.fixture
def stuck(world, engine_of, monkeypatch):
    """An engine with one row in which a thread is in a step that doesn't end until ``release`` is set,
    and that thread's ticket."""
    engine, inside, release = engine_of(max_batch=1), threading.Event(), threading.Event()
    real = engine._second.step

    def step() -> bool:
        inside.set()
        assert release.wait(100)
        return real()

    monkeypatch.setattr(engine._second, "step", step)
    ticket = engine.submit(world.cases[0].request)
    thread = threading.Thread(target=ticket.wait)
    thread.start()
    assert inside.wait(60)
    yield engine, ticket, release
    release.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_timeout_is_kept_while_another_thread_is_in_a_long_step(world, stuck):
    engine, ticket, release = stuck
    other = engine.submit(world.cases[1].request)  # doesn't wait for the step either
    began = time.perf_counter()
    with pytest.raises(TimeoutError, match="within 0.1 s, got 0 tokens"):
        other.result(timeout=0.1)
    assert time.perf_counter() - began < 30
    assert engine.stats().answered == 0
    release.set()
    assert ticket.result(timeout=60).tokens == world.cases[0].tokens
    assert other.result(timeout=60).tokens == world.cases[1].tokens


def test_an_answer_is_returned_while_another_thread_is_still_in_a_step(world, stuck):
    engine, ticket, _ = stuck
    other = engine.submit(world.cases[1].request)
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(other.wait()))
    thread.start()
    other.fail(RequestError("internal", "by the thread that drives"))
    thread.join(60)
    assert answers and answers[0].error.reason == "internal" and not ticket.done


def test_closing_does_not_wait_for_a_step_without_end(world, stuck):
    engine, ticket, release = stuck
    other = engine.submit(world.cases[1].request)
    assert engine.close(timeout=0.1)
    assert not ticket.done and not other.done
    release.set()
    for each in (ticket, other):
        assert each.wait(timeout=60).error.reason == "cancelled"
    assert engine._second.free_rows == 1


def test_a_stream_that_is_dropped_gives_its_row_back(world, engine_of):
    """A stream neither closed nor exhausted is cancelled by the garbage collector."""
    engine = engine_of(max_batch=1)
    stream = engine.stream(world.cases[0].request.images, [70, 90], ignore_eos=True)
    next(stream)
    never_begun = engine.stream(world.cases[2].request.images, [70, 90])
    del stream, never_begun
    gc.collect()
    assert engine.submit(world.cases[1].request).result(60).tokens == world.cases[1].tokens
    assert engine.stats().failed == 1 and not engine._scheduler._open


def test_closing_while_others_wait_ends_their_waiting(world, engine_of, monkeypatch):
    """One streams, one waits, one compresses."""
    engine = engine_of(max_batch=2)
    all_in, outcome = threading.Barrier(4), {}
    real = engine._second.step

    def slowly() -> bool:  # so that none is done before all have started
        return real() if engine._closed else False

    monkeypatch.setattr(engine._second, "step", slowly)

    def stream() -> None:
        ticket = engine.submit(world.cases[0].request)
        all_in.wait(60)
        try:
            list(ticket)
        except RequestError as error:
            outcome["stream"] = error.reason

    def wait() -> None:
        ticket = engine.submit(world.cases[2].request)
        all_in.wait(60)
        outcome["wait"] = ticket.wait().error.reason

    def compress() -> None:
        all_in.wait(60)
        try:
            outcome["compress"] = len(engine.compress(world.cases[4].request.images))
        except RuntimeError as error:
            outcome["compress"] = str(error)

    threads = [threading.Thread(target=each) for each in (stream, wait, compress)]
    for thread in threads:
        thread.start()
    all_in.wait(60)
    assert engine.close(timeout=60)
    for thread in threads:
        thread.join(60)
    assert outcome["stream"] == outcome["wait"] == "cancelled"
    assert outcome["compress"] == 1 or "was closed" in outcome["compress"]
    assert engine._second.free_rows == 2


@pytest.mark.parametrize("steps", range(7))
def test_cancelling_at_every_moment(world, engine_of, steps):
    engine = engine_of(max_batch=1, lag=2)
    ticket, waiting = (engine.submit(world.cases[index].request) for index in (0, 2))
    for _ in range(steps):
        engine.step()
    ticket.cancel()
    ticket.cancel()
    answer = ticket.wait(timeout=60)
    assert answer.tokens == world.cases[0].tokens[: len(answer.tokens)]
    assert answer.error is None or answer.error.reason == "cancelled"
    assert waiting.result(timeout=60).tokens == world.cases[2].tokens
    assert engine.stats().answered + engine.stats().failed == 2
