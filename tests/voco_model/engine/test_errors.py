"""A request that fails gets a clear error, and the others are answered."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import GraniteConfig

import voco_model
from tests.voco_model import tiny
from tests.voco_model.engine.conftest import SHORT, out_of_memory
from voco_model import Request, RequestError, Sampling
from voco_model.engine.second_pass import LEFT
from voco_model.kv_store.memory_store import MemoryStore


class BrokenStore(MemoryStore):
    """Raises the errors that it is given."""

    def __init__(self, *, get: Exception | None = None, put: Exception | None = None) -> None:
        super().__init__(1 << 26)
        self.errors = {"get": get, "put": put}

    def get(self, key):
        if self.errors["get"]:
            raise self.errors["get"]
        return super().get(key)

    def put(self, entry, key=None):
        if self.errors["put"]:
            raise self.errors["put"]
        return super().put(entry, key)


def others_are_answered(world, engine, bad: Request, reason: str, message: str) -> None:
    """Checks a bad request among good ones."""
    good = world.cases[:3]
    requests = [good[0].request, bad, good[1].request, good[2].request]
    answers = engine.answer_many(requests)
    error = answers.pop(1).error
    assert isinstance(error, RequestError) and error.reason == reason
    assert message in str(error)
    assert [answer.tokens for answer in answers] == [case.tokens for case in good]
    assert engine.stats().failed == 1 and engine.stats().answered == 3
    with pytest.raises(RequestError) as raised:
        engine.submit(bad).result()
    assert raised.value.reason == reason


@pytest.fixture
def broken_file(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 no more of it")
    return str(path)


def test_an_image_that_cannot_be_decoded(world, engine_of, broken_file):
    bad = Request(broken_file, SHORT)
    others_are_answered(world, engine_of(), bad, "image", "as an image failed")


def test_a_missing_image(world, engine_of):
    bad = Request("no-such-file.jpg", SHORT)
    others_are_answered(world, engine_of(MemoryStore(1 << 26)), bad, "image", "no-such-file.jpg")


def test_an_image_that_the_model_cannot_read(world, engine_of, monkeypatch):
    """An error that shows up within a batch: its images are then read one by one."""
    engine = engine_of(max_images=4)
    first = engine._scheduler._first
    real = first.features

    def features(images):
        if any(image.tiles.abs().max() == 0 for image in images):
            raise ValueError("black")
        return real(images)

    monkeypatch.setattr(first, "features", features)
    prepare, marker = engine._images._prepare, tiny.picture(99)

    def prepared(image):
        pixels = prepare(image)
        return replace(pixels, tiles=pixels.tiles * 0) if image is marker else pixels

    monkeypatch.setattr(engine._images, "_prepare", prepared)
    others_are_answered(world, engine, Request(marker, SHORT), "internal", "ValueError: black")


@pytest.mark.parametrize(
    "text, sampling, message",
    [
        ([70] * 500, None, "at most 400 tokens, got 502"),
        (SHORT, Sampling(max_new_tokens=11), "max_new_tokens <= 10, got 11"),
        ([70, tiny.IMAGE], None, "got image_token_id 4 at 1"),
        ([70, 1000], None, "expected token ids from 0 to 261, got 1000"),
        ([], None, "at least one"),
        ("What is <image>?", None, "expected text without <image>"),
        ([{"role": "robot", "content": "What?"}], None, "got 'robot'"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}],
                }
            ],
            None,
            "got 1 images and 2 parts",
        ),
        ([{"role": "user"}], None, "expected messages with content"),
        ([True], None, "expected token ids from 0 to 261, got True"),
        (None, None, "a question, messages or a list of token ids, got NoneType"),
    ],
)
def test_a_prompt_that_cannot_be(world, engine_of, text, sampling, message):
    bad = Request(world.cases[0].request.images, text, sampling)
    others_are_answered(world, engine_of(), bad, "prompt", message)


def test_keys_that_do_not_fit(world, engine_of):
    picture = world.cases[0].request.images
    for keys, message in ((["a" * 64] * 2, "got 2 keys for 1 images"), (["cat"], "64 lower-case")):
        with pytest.raises(RequestError, match=message):
            engine_of().answer(picture, SHORT, keys=keys)


def test_several_images_that_would_see_one_another(world, engine_of):
    pictures = world.cases[7].request.images
    world.model.config.voco_isolated = False
    try:
        with pytest.raises(RequestError, match="isolated=True"):
            engine_of().answer(pictures, SHORT)
    finally:
        world.model.config.voco_isolated = True
    with pytest.raises(RequestError, match="expected one image in mode 'full_cache', got 2"):
        engine_of(mode="full_cache").answer(pictures, SHORT)


def test_no_memory_for_a_batch_of_images_but_for_each(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=4)
    first = engine._scheduler._first
    real, sizes = first.entries, []

    def entries(features, slots):
        sizes.append(len(features))
        return out_of_memory() if len(features) > 1 else real(features, slots)

    monkeypatch.setattr(first, "entries", entries)
    tickets = [engine.submit(case.request) for case in world.cases[:6:2]]
    assert [ticket.result().tokens for ticket in tickets] == [
        case.tokens for case in world.cases[:6:2]
    ]
    assert sizes == [3, 1, 1, 1]


def test_no_memory_for_an_image(world, engine_of, monkeypatch):
    engine = engine_of()
    monkeypatch.setattr(engine._scheduler._first, "entries", out_of_memory)
    with pytest.raises(RequestError, match="smaller max_batch") as raised:
        engine.answer(world.cases[0].request.images, SHORT)
    assert raised.value.reason == "memory"
    monkeypatch.undo()
    request = world.cases[0].request
    assert engine.submit(request).result().tokens == world.cases[0].tokens, (
        "the next one tries again"
    )


def test_no_memory_for_one_prompt(world, engine_of, monkeypatch):
    """Runs out of memory only when this prompt is read."""
    bad = Request(world.cases[0].request.images, [71] * 40)
    engine = engine_of(max_batch=4)
    real = engine._second._prefill

    def prefill(packed, *rest):
        return out_of_memory() if (packed[:, :40] == 71).all(1).any() else real(packed, *rest)

    monkeypatch.setattr(engine._second, "_prefill", prefill)
    others_are_answered(world, engine, bad, "memory", "reading the prompt ran out of memory")
    assert engine._second.free_rows == 4


def test_an_error_in_decoding_fails_only_the_decoding_requests(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=2)
    running = [engine.submit(case.request) for case in world.cases[:2]]
    waiting = engine.submit(world.cases[2].request)
    engine.step()
    monkeypatch.setattr(engine._second, "_decode", out_of_memory)
    engine.step()
    monkeypatch.undo()
    for ticket in running:
        error = ticket.wait().error
        assert error.reason == "memory" and isinstance(error.__cause__, torch.OutOfMemoryError)
    assert waiting.result().tokens == world.cases[2].tokens


def test_a_store_that_raises_when_asked(world, engine_of):
    store = BrokenStore(get=RuntimeError("no such shelf"))
    engine = engine_of(store)
    with pytest.raises(RequestError, match="BrokenStore.get.*") as raised:
        engine.answer(world.cases[0].request.images, SHORT)
    assert raised.value.reason == "store" and "no such shelf" in str(raised.value)
    store.errors["get"] = None
    assert engine.submit(world.cases[0].request).result().tokens == world.cases[0].tokens


def test_a_store_that_keeps_nothing_does_not_cost_the_answer(world, engine_of, caplog):
    engine = engine_of(BrokenStore(put=OSError(28, "No space left on device")))
    with caplog.at_level(logging.WARNING, "voco_model.engine"):
        answer = engine.submit(world.cases[0].request).result()
        engine.flush()
    assert answer.tokens == world.cases[0].tokens
    assert engine.stats().put_failures == 1
    assert "No space left on device" in caplog.text


def test_an_entry_with_other_voco_tokens(world, engine_of):
    store, picture = MemoryStore(1 << 26), world.cases[0].request.images
    key = "b" * 64
    (entry,) = voco_model.compress(world.model, picture, processor=world.processor, num_voco=3)
    store.put(replace(entry, fingerprint=voco_model.fingerprint(world.model)), key)
    with pytest.raises(RequestError, match="expected an entry with 2 VoCo tokens, got one with 3"):
        engine_of(store).answer(picture, SHORT, keys=[key])


def test_sharing_an_entry_with_another_number_of_voco_tokens(world, engine_of, monkeypatch):
    """Also for a request that comes while the first one is looking the entry up."""
    store, request = MemoryStore(1 << 26), world.cases[0].request
    asked = Request(request.images, request.text, keys=["b" * 64])
    (entry,) = voco_model.compress(
        world.model, request.images, processor=world.processor, num_voco=3
    )
    store.put(replace(entry, fingerprint=voco_model.fingerprint(world.model)), "b" * 64)
    engine, sharing, real = engine_of(store), [], store.get

    def get(key):
        if not sharing:
            sharing.append(engine.submit(asked))
        return real(key)

    monkeypatch.setattr(store, "get", get)
    for ticket in (engine.submit(asked), *sharing):
        error = ticket.wait(timeout=60).error
        assert error.reason == "store" and "2 VoCo tokens, got one with 3" in str(error)


def test_an_entry_of_another_model(world, engine_of):
    store, picture = MemoryStore(1 << 26), world.cases[0].request.images
    key = "c" * 64
    (entry,) = voco_model.compress(world.model, picture, processor=world.processor)
    name = voco_model.fingerprint(world.model)
    store.put(replace(entry, kv=entry.kv[:2].clone(), fingerprint=name), key)
    engine = engine_of(store)
    with pytest.raises(RequestError, match="layers"):
        engine.answer(picture, SHORT, keys=[key])
    store.put(replace(entry, fingerprint="another"), key)
    with pytest.raises(RequestError, match="got one of 'another' under key"):
        engine.answer(picture, SHORT, keys=[key])
    assert engine.submit(world.cases[0].request).result().tokens == world.cases[0].tokens


def test_numbers_that_are_none_stay_with_their_request(world, engine_of):
    """NaN from an entry must not affect the next request in its row."""
    request, tokens = world.cases[0].request, world.cases[0].tokens
    store, poison = poisoned(world)
    for max_batch in (1, 2):
        engine = engine_of(store, max_batch=max_batch)
        bad = engine.submit(poison)
        beside = engine.submit(request)
        with pytest.raises(RequestError, match="logits contain NaN"):
            bad.result()
        assert beside.result().tokens == tokens
        assert engine.submit(request).result().tokens == tokens


def poisoned(world, key: str = "d" * 64) -> tuple[MemoryStore, Request]:
    """A store with an entry full of NaN, and a request that loads it."""
    request = world.cases[0].request
    (entry,) = voco_model.compress(world.model, request.images, processor=world.processor)
    nan = torch.full_like(entry.kv, float("nan"))
    store = MemoryStore(1 << 26)
    store.put(replace(entry, kv=nan, fingerprint=voco_model.fingerprint(world.model)), key)
    return store, Request(request.images, [70] * 30, keys=[key])


def test_nan_of_a_cancelled_request_is_cleared(world, engine_of):
    """Cancelled before its tokens have reached the host."""
    store, bad = poisoned(world)
    engine = engine_of(store, max_batch=1, lag=3)
    ticket = engine.submit(bad)
    engine.step()
    ticket.cancel()
    assert engine.submit(world.cases[0].request).result().tokens == world.cases[0].tokens


def test_numbers_that_are_none_do_not_stay_where_a_row_came_from(world, engine_of):
    store, bad = poisoned(world)
    engine = engine_of(store, max_batch=2, lag=3)
    first = engine.submit(replace(world.cases[0].request, sampling=Sampling(max_new_tokens=1)))
    moved = engine.submit(bad)
    first.result()
    assert moved.wait().error.reason == "internal"
    tickets = [engine.submit(case.request) for case in world.cases[:2]]
    assert [each.result().tokens for each in tickets] == [case.tokens for case in world.cases[:2]]


def test_an_image_that_overflows_is_not_kept(world, engine_of, monkeypatch):
    store = MemoryStore(1 << 26)
    engine = engine_of(store, max_images=2)
    first = engine._scheduler._first
    real = first.features
    monkeypatch.setattr(first, "features", lambda images: [each * 1e38 for each in real(images)])
    with pytest.raises(RequestError, match="keys and values contain NaN") as raised:
        engine.submit(world.cases[0].request).result()
    assert raised.value.reason == "image"
    monkeypatch.undo()
    engine.flush()
    assert not len(store)
    for index in (2, 0, 4):  # a shorter image isn't affected by the longer one before
        assert (
            engine.submit(world.cases[index].request).result().tokens == world.cases[index].tokens
        )


def test_an_error_over_one_answer_loses_no_tokens_of_another(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=2)
    bad, good = (engine.submit(case.request) for case in world.cases[:2])

    def stopped():
        raise RuntimeError("Already borrowed")

    monkeypatch.setattr(bad, "stopped", stopped)
    with pytest.raises(RequestError, match="Already borrowed"):
        bad.result()
    assert good.result(timeout=60).tokens == world.cases[1].tokens


def test_an_iterator_of_images_that_raises(world, engine_of):
    paths = ["no-such-file.png"]
    bad = Request((PIL.Image.open(path) for path in paths), SHORT)
    answers = engine_of().answer_many([world.cases[0].request, bad, world.cases[1].request])
    assert answers[1].error.reason == "image" and "FileNotFoundError" in str(answers[1].error)
    assert [answers[0].tokens, answers[2].tokens] == [case.tokens for case in world.cases[:2]]


def test_a_store_that_hangs_does_not_stop_the_engine(world, engine_of, caplog):
    release = threading.Event()

    class Hanging(MemoryStore):
        def put(self, entry, key=None):
            release.wait(60)

    engine = engine_of(Hanging(1 << 26))
    try:
        for case in world.cases[:3]:
            assert engine.submit(case.request).result(timeout=60).tokens == case.tokens
        assert not engine.flush(timeout=0.05)
        assert not engine.close(timeout=0.05)
    finally:
        release.set()
    assert engine.flush(timeout=60)
    assert engine.stats().put_failures == 1, "the one that had not begun"
    assert "1 entries could not be stored" in caplog.text


def test_a_freed_row_generates_nothing(world, engine_of):
    engine = engine_of(max_batch=2)
    ticket = engine.submit(world.cases[0].request)
    engine.step()
    ticket.cancel()
    engine.step()
    state = engine._second._state.clone()
    other = engine.submit(world.cases[1].request)
    assert state[:, LEFT].tolist() == [0, 0, 0]
    assert other.result().tokens == world.cases[1].tokens


def test_a_prompt_that_failed_leaves_no_row_running(world, engine_of, monkeypatch):
    engine = engine_of(max_batch=2)
    real = engine._second._choose

    def choose(*arguments):
        real(*arguments)
        out_of_memory()

    monkeypatch.setattr(engine._second, "_choose", choose)
    with pytest.raises(RequestError):
        engine.submit(world.cases[0].request).result()
    assert engine._second._state[:, LEFT].tolist() == [0, 0, 0]


def test_a_language_model_that_does_more_than_run_its_layers():
    model = tiny.tiny_llava("llava", text_class=GraniteConfig, embedding_multiplier=3.0)
    processor = tiny.tiny_processor("llava")
    with (
        voco_model.enable(model, processor),
        pytest.raises(ValueError, match="runs its layers and its norm and nothing else"),
    ):
        voco_model.TwoPassEngine(model, processor)


def test_a_request_that_is_given_up(world, engine_of):
    engine = engine_of(max_batch=1)
    running, waiting = (engine.submit(case.request) for case in world.cases[:2])
    engine.step()
    running.cancel()
    with pytest.raises(RequestError) as raised:
        running.result()
    assert raised.value.reason == "cancelled"
    assert waiting.result().tokens == world.cases[1].tokens
    waiting.cancel()
    assert waiting.result().tokens == world.cases[1].tokens, "a finished one stays"


def test_closing_gives_up_what_waits(world, engine_of):
    engine = engine_of()
    ticket = engine.submit(world.cases[0].request)
    engine.close()
    assert ticket.wait().error.reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(world.cases[0].request)


def test_what_is_no_request_stops_answer_many(world, engine_of):
    engine = engine_of()
    with pytest.raises(TypeError, match=r"expected a Request\(images, text\), got str"):
        engine.answer_many([world.cases[0].request, "What?"])
    assert engine.submit(world.cases[1].request).result().tokens == world.cases[1].tokens


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_batch": 0}, "expected an int max_batch >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "expected an int max_new_tokens >= 1, got 2.5"),
        ({"mode": "fast"}, "expected mode to be one of voco, full_cache, uncached, got 'fast'"),
        ({"graphs": True}, "expected a model on CUDA with graphs=True, got one on cpu"),
        ({"lag": -1}, "expected an int lag >= 0, got -1"),
        ({"lag": "x"}, "expected an int lag >= 0, got 'x'"),
        ({"dtype": "bf16"}, "expected dtype as a torch.dtype, got 'bf16'"),
        ({"store": {}}, "expected a store or None, got dict"),
        ({"processor": None}, "expected the processor that was given to enable"),
    ],
)
def test_an_engine_that_cannot_be(world, options, message):
    parts = {"processor": world.processor, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        voco_model.TwoPassEngine(world.model, **parts)


def test_a_store_for_another_model(world):
    with pytest.raises(ValueError, match="got one for 'another'"):
        voco_model.TwoPassEngine(
            world.model, world.processor, MemoryStore(1 << 20, fingerprint="another")
        )


def test_suppressed_tokens_that_the_model_does_not_have(world):
    world.model.generation_config.suppress_tokens = [10_000]
    try:
        with pytest.raises(ValueError, match="expected suppress_tokens from 0 to 261"):
            voco_model.TwoPassEngine(world.model, world.processor)
    finally:
        world.model.generation_config.suppress_tokens = None


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 32, 32, 3), np.uint8)])
def test_no_image_in_the_list(world, engine_of, images):
    with pytest.raises(RequestError, match="expected at least one image"):
        next(engine_of().stream(images, SHORT))


@pytest.mark.parametrize(
    "images, message",
    [
        (b"abc", "got 3 bytes, in no format that Pillow can read"),
        ({"image": 1}, "expected an image (PIL's, a path or URL, "),
        (["no-such-file.jpg"], "expected an image, got no-such-file.jpg, which was not found"),
        ([tiny.picture(0), None], "image 2 of 2: expected an image "),
        ([], "or None for a question without any, got an empty list"),
        (np.zeros((0, 9, 9, 3)), "expected at least one image, got an array of shape [0, 9, 9, 3]"),
        (np.full((9, 9, 3), -1.0), "expected floats from 0 to 1"),
        (PIL.Image.new("RGB", (1, 600)), "expected an image with sides of at most 1 to 200"),
    ],
)
def test_what_is_no_image(world, engine_of, images, message):
    others_are_answered(world, engine_of(), Request(images, SHORT), "image", message)


def test_limits_are_the_engines(world, engine_of):
    small = voco_model.PictureLimits(max_pixels=100)
    with engine_of(limits=small) as engine:
        with pytest.raises(RequestError, match="of at most 100 pixels") as raised:
            engine.answer(tiny.picture(0), SHORT)
        assert raised.value.reason == "image"
        with pytest.raises(RequestError, match="image 2 of 2: expected an image of at most 100"):
            engine.compress([tiny.picture(0, (8, 8)), tiny.picture(0)])


def test_a_generation_option_that_would_be_ignored(world):
    world.model.generation_config.repetition_penalty = 1.2
    try:
        with pytest.raises(ValueError, match="no repetition_penalty .* got 1.2"):
            voco_model.TwoPassEngine(world.model, world.processor)
    finally:
        world.model.generation_config.repetition_penalty = None


def test_a_model_that_is_not_ready(kind):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    with pytest.raises(ValueError, match="expected an enabled model"):
        voco_model.TwoPassEngine(model, processor)
    with voco_model.enable(model, processor):
        model.train()
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            voco_model.TwoPassEngine(model, processor)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"temperature": float("nan")}, "temperature >= 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_p": 0.5}, "temperature above 0 with top_p 0.5, got 0"),
        ({"seed": -1}, "seed from 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"stop": ""}, "at least one character"),
        ({"stop": 5}, "in a list, got 5"),
        ({"temperature": "a"}, "temperature >= 0"),
        ({"seed": 1.5}, "seed from 0"),
        ({"ignore_eos": "x"}, "True or False"),
    ],
)
def test_sampling_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("temprature", r"did you mean temperature\?"),
        ("max_tokens", r"did you mean max_new_tokens\?"),
        ("repetition_penalty", "for others use voco_model.generate"),
    ],
)
def test_an_unknown_sampling_option_is_answered_with_those_there_are(name, hint):
    with pytest.raises(TypeError, match=f"among max_new_tokens, temperature.*, got {name}; {hint}"):
        Sampling(**{name: 1})


def test_sampling_can_be_copied_and_pickled():
    sampling = Sampling(temperature=0.5, top_p=0.9, stop=["x"])
    assert pickle.loads(pickle.dumps(sampling)) == copy.deepcopy(sampling) == sampling
    assert replace(sampling, top_p=1.0) == Sampling(temperature=0.5, stop="x")


# ---- a model that changes during use


def test_a_changed_model_is_refused(world, engine_of):
    engine = engine_of()
    before = engine.answer(tiny.picture(0), SHORT).tokens
    norm = world.model.model.language_model.norm
    norm.variance_epsilon *= 2
    try:
        with pytest.raises(ValueError, match=r"language_model\.norm\.variance_epsilon: .* before"):
            engine.answer(tiny.picture(0), SHORT)
    finally:
        norm.variance_epsilon /= 2
    assert engine.answer(tiny.picture(0), SHORT).tokens == before


def test_a_model_that_changes_before_its_image_is_read_keeps_no_entry(world, engine_of):
    store = MemoryStore(1 << 20)
    engine = engine_of(store=store)
    ticket = engine.submit(Request(tiny.picture(0), SHORT))
    norm = world.model.model.language_model.norm
    norm.variance_epsilon *= 2
    try:
        while not ticket.done:
            engine.step()
    finally:
        norm.variance_epsilon /= 2
    with pytest.raises(RequestError, match="expected the model as it was when the engine was made"):
        ticket.result()
    assert engine.flush() and len(store) == 0


def test_an_engine_computes_outside_its_callers_autocast(world, engine_of):
    store = MemoryStore(1 << 20)
    engine = engine_of(store=store)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = engine.compress(tiny.picture(0))
    engine.flush()
    (entry,) = voco_model.compress(
        world.model, tiny.picture(0), processor=world.processor, store=store
    )
    assert store.stats().hits == 1 and torch.equal(entry.kv, inside.kv)
    (alone,) = voco_model.compress(world.model, tiny.picture(0), processor=world.processor)
    torch.testing.assert_close(entry.kv, alone.kv, rtol=0, atol=1e-5)
