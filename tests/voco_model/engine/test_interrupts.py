"""Interrupts at any point of the thread that drives the engine lose no request."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import voco_model
from tests.voco_model.engine.conftest import SHORT
from voco_model import Request, Sampling
from voco_model.engine import scheduler
from voco_model.kv_store.memory_store import MemoryStore

_ENGINE = str(Path(voco_model.__file__).parent / "engine")
_WATCHED = (_ENGINE, contextlib.__file__, torch.autograd.grad_mode.__file__)


@pytest.fixture(autouse=True)
def grad_mode():
    """Restores grad mode, which an interrupt may have left off, for the next tests."""
    yield
    torch.set_grad_enabled(True)


class Interrupt(BaseException):
    """What a signal handler raises."""


class Alarm(Exception):  # noqa: N818  (not an error)
    """An Exception, which within a step can't be told from an error of the step itself."""


class Interrupter:
    """Raises where Python may run a signal handler while this package's code runs: when a function is
    entered, and after each call, of Python's functions and of C's.

    Args:
        at: the place that raises, counted from 0; None raises nowhere.
        kind: of what is raised.
    """

    def __init__(self, at: int | None = None, kind: type[BaseException] = Interrupt) -> None:
        self.at, self._kind = at, kind
        self.places: list[tuple] = []

    def __enter__(self) -> Interrupter:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, kind, *rest) -> bool:
        sys.setprofile(None)
        # An Alarm may have become an answer's RequestError.
        return kind is self._kind or (self._kind is Alarm and kind is voco_model.RequestError)

    def _profile(self, frame, event: str, what) -> None:
        code = frame.f_code
        if event not in ("call", "return", "c_return") or not code.co_filename.startswith(_WATCHED):
            return
        name = getattr(what, "__name__", "") if event == "c_return" else ""
        self.places.append((code.co_filename, code.co_name, frame.f_lineno, event, name))
        if self.at is not None and len(self.places) > self.at:
            raise self._kind


class Scene:
    """An engine with two rows, and five requests: two share an image, one streams, one samples, one has
    two images; and an image to compress."""

    def __init__(self, world, engine_of) -> None:
        self.store = MemoryStore(1 << 26)
        self.engine = engine_of(self.store, max_batch=2, max_images=2, lag=1)
        self._world = world
        picture = world.cases[0].request.images
        sampled = Request(picture, SHORT, Sampling(temperature=1.0, seed=5, max_new_tokens=4))
        self.requests = [world.cases[index].request for index in (0, 1, 2, 7)] + [sampled]
        self.compressed = world.cases[4].request.images
        answers = self.engine.answer_many(self.requests)
        assert [answer.error for answer in answers] == [None] * len(answers)
        self.expected = [answer.tokens for answer in answers]
        assert self.expected[:4] == [world.cases[index].tokens for index in (0, 1, 2, 7)]
        self.text = answers[2].text
        self._forget()

    def _forget(self) -> None:
        assert self.engine.flush(timeout=60)
        self.store.clear()

    def play(self, tickets: list, pieces: list[str]) -> None:
        """In the thread that is interrupted."""
        for request in self.requests:
            tickets.append(self.engine.submit(request))
        self.engine.compress(self.compressed)
        for piece in tickets[2]:
            pieces.append(piece)
        for ticket in tickets:
            ticket.result()

    def check(self, tickets: list, pieces: list[str], kind: type[BaseException]) -> None:
        """Checks from another thread that the engine works."""
        outcome: list = []

        def wait() -> None:
            for ticket in tickets:
                outcome.append(ticket.wait(timeout=30))
            more = [self.engine.submit(request) for request in self.requests]
            outcome.extend(ticket.wait(timeout=30) for ticket in more)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(100)
        expected = self.expected[: len(tickets)] + self.expected
        assert len(outcome) == len(expected)
        for index, (answer, tokens) in enumerate(zip(outcome, expected, strict=True)):
            if kind is Alarm and index < len(tickets) and answer.error is not None:
                assert "Alarm" in str(answer.error)
            else:
                assert (answer.error or answer.tokens) == tokens
        assert self.text.startswith("".join(pieces))
        if len(tickets) > 2 and outcome[2].error is None:
            assert "".join(tickets[2]) == self.text
        queue, second = self.engine._scheduler, self.engine._second
        for _ in range(3):  # tokens of rows that have ended are on their way
            self.engine.step()
        assert not self.engine.step(), "nothing is left to do"
        assert second.free_rows == 2 and not queue._waiting and not queue._open
        self._forget()


def places_of(scene: Scene) -> list[int]:
    """The first and last time that each place is reached."""
    with Interrupter() as interrupter:
        scene.play([], [])
    scene._forget()
    places = interrupter.places
    firsts = {place: at for at, place in reversed(list(enumerate(places)))}
    lasts = {place: at for at, place in enumerate(places)}
    assert len(firsts) > 300
    return sorted({*firsts.values(), *lasts.values()})


def interrupt_everywhere(world, engine_of, kind, start: int, stride: int) -> None:
    scene = Scene(world, engine_of)
    for at in places_of(scene)[start::stride]:
        tickets, pieces = [], []
        with Interrupter(at, kind) as interrupter:
            scene.play(tickets, pieces)
        place = interrupter.places[-1]
        try:
            scene.check(tickets, pieces, kind)
        except BaseException as error:
            raise AssertionError(f"interrupted at {place}") from error
    if kind is Interrupt:
        assert scene.engine.stats().failed == 0


@pytest.mark.parametrize("raised", [Interrupt, Alarm])
def test_an_exception_at_any_call_loses_no_request(world, engine_of, raised):
    """A sample of the places; the test below takes more."""
    interrupt_everywhere(world, engine_of, raised, start=7, stride=160)


@pytest.mark.slow
@pytest.mark.parametrize("raised", [Interrupt, Alarm])
def test_an_exception_at_many_calls_loses_no_request(world, engine_of, raised):
    interrupt_everywhere(world, engine_of, raised, start=20 * (raised is Alarm), stride=45)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_signals_at_any_time_lose_no_request(world, engine_of):
    """Anywhere: in torch, in the store, in the standard library."""
    scene = Scene(world, engine_of)
    began = time.perf_counter()
    scene.play([], [])
    takes = time.perf_counter() - began
    scene._forget()

    def interrupt(*_) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for part in range(1, 10):
            tickets, pieces = [], []
            try:
                signal.setitimer(signal.ITIMER_REAL, takes * part / 10)
                scene.play(tickets, pieces)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
            scene.check(tickets, pieces, Interrupt)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert scene.engine.stats().failed == 0


def raise_interrupt(*_, **__):
    raise Interrupt


def answered_elsewhere(ticket, timeout: float = 60.0):
    """The answer, from another thread."""
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(ticket.wait(timeout)))
    thread.start()
    thread.join(timeout + 10)
    return answers[0]


def test_another_thread_continues_an_answer(world, engine_of, monkeypatch):
    """An unfinished row is read again with its tokens, and none is generated twice."""
    case = next(case for case in world.cases[:6] if len(case.tokens) > 5)
    engine = engine_of(max_batch=2, lag=1)
    ticket, other = engine.submit(case.request), engine.submit(world.cases[8].request)
    for _ in range(3):
        engine.step()
    written = list(ticket.tokens)
    assert 0 < len(written) < len(case.tokens)
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(engine._second, "arrived", raise_interrupt)
        engine.step()
    assert ticket.tokens == written
    assert answered_elsewhere(ticket).tokens == case.tokens
    assert other.result().tokens == world.cases[8].tokens


def test_a_sampled_answer_continues_with_the_next_draws(world, engine_of, monkeypatch):
    picture = world.cases[0].request.images
    sampling = {"temperature": 1.0, "seed": 3, "ignore_eos": True}
    engine = engine_of(max_batch=1)
    expected = engine.answer(picture, SHORT, **sampling).tokens
    ticket = engine.submit(Request(picture, SHORT, Sampling(**sampling)))
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(engine._second, "_decode", raise_interrupt)
        engine.step()
    assert ticket.result().tokens == expected


def test_a_first_token_that_was_sent_before_the_error_does_not_count(world, engine_of, monkeypatch):
    """After an exception following the prefill, the prompts are read again, one by one."""
    engine, failed = engine_of(max_batch=2), []
    real = engine._second._send

    def send(tokens, rows):
        real(tokens, rows)
        if not failed:
            failed.append(len(rows))
            raise MemoryError

    monkeypatch.setattr(engine._second, "_send", send)
    tickets = [engine.submit(world.cases[index].request) for index in (0, 2)]
    assert [each.result().tokens for each in tickets] == [
        world.cases[index].tokens for index in (0, 2)
    ]
    assert failed == [2]


def test_an_error_once_a_prompt_is_made_leaves_no_row_taken(world, engine_of, monkeypatch):
    """Its request has failed or continues; a failed one must not get a row."""
    engine = engine_of(max_batch=1)
    chosen: list = []

    def once(pair):
        if not chosen:
            chosen.append(pair)
            raise Alarm
        return real(pair)

    real = scheduler.kind_of
    monkeypatch.setattr(scheduler, "kind_of", once)
    ticket = engine.submit(world.cases[0].request)
    with pytest.raises(Alarm):
        engine.step()
    assert ticket.result(timeout=60).tokens == world.cases[0].tokens
    assert engine._second.free_rows == 1


def test_sharing_the_image_of_an_interrupted_request(world, engine_of, monkeypatch):
    """The other request gets a clear error, and the next one gets the image."""
    engine = engine_of(MemoryStore(1 << 26))
    request, tokens = world.cases[0].request, world.cases[0].tokens
    sharing: list = []

    def prepare(image):
        sharing.append(engine.submit(request))
        raise Interrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(engine._images, "_prepare", prepare)
        engine.submit(request)
    assert not sharing[0].done
    again = engine.submit(request)
    error = sharing[0].wait(timeout=60).error
    assert error.reason == "interrupted" and "submit this request again" in str(error)
    assert again.result(timeout=60).tokens == tokens


def test_compress_beside_an_interrupted_thread(world, engine_of, monkeypatch):
    engine = engine_of(MemoryStore(1 << 26))
    picture, outcome, entered = world.cases[0].request.images, [], threading.Event()
    real = engine._scheduler.read

    def compress() -> None:
        try:
            engine.compress(picture)
        except voco_model.RequestError as error:
            outcome.append(error.reason)

    def read(jobs):
        entered.set()
        return real(jobs)

    def prepare(image):
        thread.start()
        assert entered.wait(60)
        raise Interrupt

    thread = threading.Thread(target=compress)
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(engine._scheduler, "read", read)
        patched.setattr(engine._images, "_prepare", prepare)
        engine.submit(world.cases[0].request)
    thread.join(60)
    assert outcome == ["interrupted"]
    assert engine.compress(picture)[0].num_tokens == 2


def test_a_request_that_interrupts_by_itself_does_not_stop_the_others(world, engine_of):
    """Like a panic in a tokenizer written in Rust: not an Exception, and raised every time."""
    engine = engine_of(max_batch=2)
    bad, good = (engine.submit(world.cases[index].request) for index in (0, 2))
    bad._decode = raise_interrupt
    interrupts = 0
    while not bad.done:
        try:
            engine.step()
        except Interrupt:
            interrupts += 1
            assert interrupts < 10
    error = bad.wait().error
    assert error.reason == "interrupted" and "the request itself may be at fault" in str(error)
    assert good.result(timeout=60).tokens == world.cases[2].tokens


def test_a_device_that_is_lost_ends_every_request(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=1)
    tickets = [engine.submit(case.request) for case in world.cases[:3]]
    engine.step()
    broken = RuntimeError("an illegal memory access was encountered")
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(engine._second, "step", raise_interrupt)
        engine.step()

    def lost():
        raise broken

    monkeypatch.setattr(engine._second, "reset", lost)
    for ticket in tickets:
        error = ticket.wait(timeout=60).error
        assert error.reason == "internal" and error.__cause__ is broken


def test_a_signal_handler_that_calls_the_engine_of_its_thread(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=1)
    real, refused, submitted = engine._second.step, [], []

    def step() -> bool:  # as if the handler ran here
        if not refused:
            submitted.append(engine.submit(world.cases[2].request))
            with pytest.raises(RuntimeError, match="call the engine in another thread") as raised:
                submitted[0].wait()
            refused.append(raised.value)
        return real()

    monkeypatch.setattr(engine._second, "step", step)
    assert engine.submit(world.cases[0].request).result().tokens == world.cases[0].tokens
    assert refused and submitted[0].result().tokens == world.cases[2].tokens


def test_a_signal_handler_that_closes_the_engine(world, engine_of, monkeypatch):
    engine = engine_of(MemoryStore(1 << 26), max_batch=1)
    real = engine._second.step

    def step() -> bool:
        assert engine.close(timeout=60)
        return real()

    monkeypatch.setattr(engine._second, "step", step)
    tickets = [engine.submit(case.request) for case in world.cases[:2]]
    assert [each.wait(timeout=60).error.reason for each in tickets] == ["cancelled"] * 2
    assert engine._second.free_rows == 1


def test_answer_many_that_is_interrupted_gives_up_its_requests(world, engine_of, monkeypatch):
    """Also those still being prepared in its threads, without waiting for them."""
    store, release = MemoryStore(1 << 26), threading.Event()
    engine, tickets = engine_of(store), []
    real_submit, real_get = engine.submit, store.get

    def submit(request):
        tickets.append(real_submit(request))
        return tickets[-1]

    def get(key):
        assert release.wait(100)
        return real_get(key)

    def requests():
        yield world.cases[9].request  # without an image
        yield world.cases[0].request
        raise Interrupt

    monkeypatch.setattr(engine, "submit", submit)
    monkeypatch.setattr(store, "get", get)
    with pytest.raises(Interrupt):
        engine.answer_many(requests())
    release.set()
    other = real_submit(world.cases[2].request)
    assert other.result(timeout=60).tokens == world.cases[2].tokens
    for ticket in tickets:
        assert ticket.wait(timeout=60).error.reason == "cancelled"
