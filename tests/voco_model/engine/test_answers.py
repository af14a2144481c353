"""The engine's answers equal those of ``generate`` in one masked pass, whatever else it is doing."""

from __future__ import annotations

import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import voco_model
from tests.voco_model import tiny
from tests.voco_model.engine.conftest import (
    NEW_TOKENS,
    NUM_VOCO,
    generated,
    images_of,
    inputs_of,
)
from voco_model import Request, RequestError, Sampling
from voco_model.engine import second_pass
from voco_model.kv_store.memory_store import MemoryStore


def tokens_of(answers) -> list:
    return [answer.error or answer.tokens for answer in answers]


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_answers_are_those_of_one_masked_pass(world, engine_of, max_batch):
    answers = engine_of(max_batch=max_batch).answer_many([case.request for case in world.cases])
    assert tokens_of(answers) == [case.tokens for case in world.cases]
    tokenizer = world.processor.tokenizer
    for answer, case in zip(answers, world.cases, strict=True):
        assert answer.text == tokenizer.decode(case.tokens, skip_special_tokens=True)
        stopped = case.tokens[-1] in world.model.generation_config.eos_token_id
        assert answer.finish_reason == ("stop" if stopped else "length")
        assert 0 < answer.seconds_to_first <= answer.seconds


def test_answers_are_those_of_a_padded_batch(world, engine_of):
    requests = [case.request for case in world.cases if case.request.sampling is None]
    inputs = inputs_of(world.processor, requests)
    assert not inputs["attention_mask"].all(), "the batch is ragged"
    rows = world.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    answers = engine_of(max_batch=8).answer_many(requests)
    for row, answer in zip(rows[:, inputs["input_ids"].shape[1] :].tolist(), answers, strict=True):
        assert row[: len(answer.tokens)] == list(answer.tokens)
        assert len(answer.tokens) == NEW_TOKENS or answer.finish_reason == "stop"


arrivals = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(
    arrivals=arrivals,
    max_batch=st.integers(1, 5),
    max_images=st.integers(1, 3),
    lag=st.integers(0, 3),
    given_up=st.sets(st.integers(0, 8), max_size=2),
)
def test_answers_do_not_depend_on_when_requests_come(
    world, arrivals, max_batch, max_images, lag, given_up
):
    """Requests join while others decode, and some are cancelled half-way."""
    engine = voco_model.TwoPassEngine(
        world.model,
        world.processor,
        max_batch=max_batch,
        max_images=max_images,
        lag=lag,
        max_new_tokens=NEW_TOKENS,
        max_prompt_tokens=400,
    )
    tickets = []
    for place, (index, steps) in enumerate(arrivals):
        tickets.append(
            (engine.submit(world.cases[index].request), world.cases[index].tokens, place)
        )
        for _ in range(steps):
            engine.step()
        for ticket, _, earlier in tickets:
            if earlier in given_up and not ticket.done:
                ticket.cancel()
    for ticket, tokens, place in tickets:
        answer = ticket.wait()
        if answer.error is None:
            assert answer.tokens == tokens
        else:
            assert place in given_up and answer.error.reason == "cancelled"
            assert answer.tokens == tokens[: len(answer.tokens)]
    for _ in range(lag):  # tokens of rows that ended are still on their way
        engine.step()
    assert not engine.step(), "nothing is left to do"
    assert engine.stats().answered + engine.stats().failed == len(tickets)


def test_callers_in_several_threads_share_the_batch(world, engine_of):
    engine = engine_of(max_batch=4)
    answers: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        request = world.cases[index].request
        answers[index] = engine.submit(request).result().tokens

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(world.cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {index: case.tokens for index, case in enumerate(world.cases)}
    written = sum(len(case.tokens) for case in world.cases)
    assert engine.stats().decode_steps < written - len(world.cases), "they decoded together"


@pytest.mark.parametrize("mode", ["uncached", "full_cache"])
def test_baselines_answer_as_the_plain_model(world, engine_of, mode):
    requests = [case.request for case in world.cases]
    if mode == "full_cache":
        requests = [request for request in requests if len(images_of(request)) < 2]
    expected = [generated(world.model, world.processor, each, mode) for each in requests]
    store = MemoryStore(1 << 26)
    engine = engine_of(store, mode=mode, max_batch=3)
    for _ in range(2):  # the second time from the store
        assert tokens_of(engine.answer_many(requests)) == expected
    engine.flush()
    found = engine.stats().images_from_store
    assert (found == 0) == (mode == "uncached")
    for key in store:
        assert store.get(key).num_tokens > NUM_VOCO, "all tokens of the image are kept"


def test_entries_come_from_the_store_the_second_time(world, engine_of):
    requests = [case.request for case in world.cases]
    expected = [case.tokens for case in world.cases]
    store = MemoryStore(1 << 26)
    with engine_of(store) as engine:
        assert tokens_of(engine.answer_many(requests)) == expected
    with engine_of(store) as engine:
        again = engine.answer_many(requests)
    assert tokens_of(again) == expected
    assert engine.stats().images_read == 0
    assert [answer.from_store for answer in again] == [len(images_of(each)) for each in requests]
    # The first image of a prompt has the key that compress gives it.
    voco_model.compress(
        world.model, world.cases[0].request.images, processor=world.processor, store=store
    )
    assert store.stats().puts == len(store)


def test_frames_may_be_one_array(world, engine_of):
    frames = [picture.resize((48, 48)) for picture in world.cases[7].request.images]
    expected = engine_of().answer(frames, [70, 90]).tokens
    assert (
        engine_of().answer(np.stack([np.asarray(f) for f in frames]), [70, 90]).tokens == expected
    )


def test_images_may_be_paths(world, engine_of, tmp_path):
    path = tmp_path / "picture.png"
    world.cases[0].request.images.save(path)
    assert engine_of().answer(path, world.cases[0].request.text).tokens == world.cases[0].tokens


def test_images_may_be_in_the_messages(world, engine_of):
    """OpenAI's form, with the picture as a data URI."""
    buffer = io.BytesIO()
    picture = world.cases[0].request.images
    picture.save(buffer, format="png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Who?"}]
    engine = engine_of()
    answer = engine.answer(None, [{"role": "user", "content": parts}])
    assert answer.tokens == engine.answer(picture, "Who?").tokens
    with pytest.raises(RequestError, match="expected messages with content") as caught:
        engine.answer(None, [{"role": "user", "content": [{"type": "image_url"}]}])
    assert caught.value.reason == "prompt"


@pytest.mark.parametrize("max_images", [3, 5])
def test_batches_of_images_that_are_no_power_of_two(world, engine_of, max_images):
    engine = engine_of(max_images=max_images, max_batch=8)
    first, batches = engine._scheduler._first, []
    real = first.entries
    first.entries = lambda features, slots: batches.append(len(features)) or real(features, slots)
    tickets = [engine.submit(case.request) for case in world.cases]
    assert [ticket.result().tokens for ticket in tickets] == [case.tokens for case in world.cases]
    assert batches[0] == max_images and sum(batches) == engine.stats().images_read


def test_an_image_that_many_ask_about_is_read_once(world, engine_of):
    picture = world.cases[0].request.images
    engine = engine_of(max_batch=4)
    tickets = [engine.submit(Request(picture, f"question {index}")) for index in range(6)]
    for ticket in tickets:
        ticket.result()
    assert engine.stats().images_read == 1


def test_compress_gives_the_entries_of_compress(world, engine_of):
    pictures = [case.request.images for case in world.cases[:6:2]]
    expected = voco_model.compress(world.model, pictures, processor=world.processor)
    for entry, other in zip(engine_of(max_images=2).compress(pictures), expected, strict=True):
        torch.testing.assert_close(entry.kv, other.kv, atol=2e-5, rtol=1e-4)
        assert torch.equal(entry.positions, other.positions)
        assert entry.next_position == other.next_position


def test_streams_the_answer_in_pieces(world, engine_of):
    case = next(case for case in world.cases if len(case.tokens) == NEW_TOKENS)
    engine = engine_of()
    pieces = list(engine.stream(case.request.images, case.request.text))
    assert "".join(pieces) == engine.answer(case.request.images, case.request.text).text
    assert len(pieces) > 1 and all(pieces)


def test_a_stream_left_early_frees_its_row(world, engine_of):
    engine = engine_of(max_batch=1)
    stream = engine.stream(world.cases[0].request.images, [70, 90], ignore_eos=True)
    next(stream)
    stream.close()
    assert engine.submit(world.cases[1].request).result().tokens == world.cases[1].tokens


def test_stop_strings_end_an_answer_and_are_not_part_of_it(world, engine_of):
    case = next(case for case in world.cases if len(case.tokens) == NEW_TOKENS)
    engine = engine_of()
    whole = engine.answer(case.request.images, case.request.text).text
    stop = whole[3:5]
    at = whole.index(stop)
    answer = engine.answer(case.request.images, case.request.text, stop=[stop, "never"])
    assert answer.text == whole[:at] and answer.finish_reason == "stop"
    assert len(answer.tokens) < NEW_TOKENS
    streamed = "".join(engine.stream(case.request.images, case.request.text, stop=stop))
    assert streamed == whole[:at], "no piece of a stop string is sent"


def test_ignore_eos_continues_after_the_end_of_sequence(world, engine_of):
    case = next(case for case in world.cases[:6] if len(case.tokens) < NEW_TOKENS)
    answer = engine_of().answer(case.request.images, case.request.text, ignore_eos=True)
    assert len(answer.tokens) == NEW_TOKENS and answer.finish_reason == "length"
    assert answer.tokens[: len(case.tokens)] == case.tokens


def test_text_may_be_a_conversation(world, engine_of):
    picture = world.cases[0].request.images
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    expected = generated(world.model, world.processor, Request(picture, turns))
    assert engine_of().answer(picture, turns).tokens == expected


def test_another_number_of_voco_tokens_than_the_model_was_enabled_with(world, engine_of):
    pictures = [world.cases[index].request.images for index in (0, 2)]
    entries = voco_model.compress(world.model, pictures, processor=world.processor, num_voco=5)
    ids = torch.tensor([[70, 90, 110]])
    rows = voco_model.generate(
        world.model, entries, ids, max_new_tokens=NEW_TOKENS, do_sample=False
    ).tolist()
    engine = engine_of(num_voco=5)
    for picture, row in zip(pictures, rows, strict=True):
        answer = engine.answer(picture, ids[0].tolist())
        assert list(answer.tokens) == row[: len(answer.tokens)] and answer.prompt_tokens == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_the_model_where_asked(kind, dtype):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    picture, ids = tiny.picture(0), [70, 90, 110]
    with voco_model.enable(model, processor, num_voco=NUM_VOCO):
        engine = voco_model.TwoPassEngine(model, processor, dtype=dtype, max_new_tokens=4)
        answer = engine.answer(picture, ids, ignore_eos=True)
        assert model.dtype == dtype and engine.compress(picture)[0].dtype == dtype
        request = Request(picture, ids, Sampling(max_new_tokens=4))
        model.generation_config.eos_token_id = None
        rotary = model.model.language_model.rotary_emb
        assert rotary.inv_freq.dtype == torch.float32, "angles must not be rounded"
        assert answer.tokens == generated(model, processor, request)


def test_names_in_place_of_pixels(world, engine_of):
    """With a key, an image whose entry is in the store is not even opened."""
    request, tokens = world.cases[0].request, world.cases[0].tokens
    store = MemoryStore(1 << 26)
    engine = engine_of(store)
    key = "a" * 64
    assert engine.answer(request.images, request.text, keys=[key]).tokens == tokens
    engine.flush()
    assert key in store
    assert engine.answer("no-such-file.jpg", request.text, keys=[key]).tokens == tokens


def test_runs_of_the_decoder_never_break_a_compiled_graph(world, engine_of):
    """On a GPU the layers go through torch.compile; here with a backend that runs them as they are."""
    cases = world.cases[:1]
    real = torch.compile
    try:
        torch.compile = lambda *args, **kwargs: real(*args, **{**kwargs, "backend": "eager"})
        engine = engine_of(max_batch=2, max_new_tokens=4, compiled=True)
    finally:
        torch.compile = real
    answers = engine.answer_many([case.request for case in cases])
    assert tokens_of(answers) == [case.tokens[:4] for case in cases]


def test_warming_up_leaves_no_trace(world, engine_of):
    store = MemoryStore(1 << 26)
    engine = engine_of(store, max_batch=4)
    engine.warmup(text_tokens=[16, 40])
    engine.warmup(batch_sizes=[2], sampled=True)
    assert not len(store)
    request = replace(world.cases[1].request, sampling=Sampling())
    assert engine.submit(request).result().tokens == world.cases[1].tokens


def test_warming_up_meets_the_shapes_that_requests_have(world, engine_of):
    """Each would be a CUDA graph, recorded in the middle of an answer."""
    engine = engine_of(max_batch=3, max_new_tokens=200)
    programs, met = engine._second.programs, set()
    real = programs.run
    programs.run = lambda key, function: met.add(key) or real(key, function)
    engine.warmup(text_tokens=[16, 32])
    warm = set(met)
    picture = tiny.picture(0, (32, 32))
    for length in (3, 16, 17, 31, 32):
        requests = [Request(picture, [70] * length)] * 3
        assert [answer.error for answer in engine.answer_many(requests)] == [None] * 3
    new = {key for key in met - warm if key[0] in ("prefill", "decode", "vision")}
    assert not new


@pytest.mark.parametrize("least", [2, 8, 128])
def test_answers_that_cross_the_slots_that_are_looked_at(world, engine_of, monkeypatch, least):
    """Decoding reads a power of two of slots, and later the next one; at the start every slot
    matters."""
    monkeypatch.setattr(second_pass, "_LEAST_SPAN", least)
    engine = engine_of(max_batch=1)
    for case in world.cases[:6:2]:
        assert engine.submit(case.request).result().tokens == case.tokens


def test_compress_and_engine_share_their_keys(world, engine_of):
    picture, other = (world.cases[index].request.images for index in (0, 2))
    store = MemoryStore(1 << 26)
    with engine_of(store) as engine:
        engine.compress(picture)
        engine.flush()
        voco_model.compress(world.model, [picture, other], processor=world.processor, store=store)
        assert store.stats().puts == 2
        assert engine.answer(other, [70, 90]).from_store == 1


def test_a_plain_llava_reads_the_image_for_each_question(world, engine_of):
    store = MemoryStore(1 << 26)
    engine = engine_of(store, mode="uncached", max_batch=4)
    picture = world.cases[0].request.images
    for answer in engine.answer_many([Request(picture, [70, index]) for index in range(80, 84)]):
        assert answer.error is None
    assert engine.stats().images_read == 4 and not len(store)


def test_waiting_may_have_an_end(world, engine_of):
    engine = engine_of()
    ticket = engine.submit(world.cases[0].request)
    with pytest.raises(TimeoutError, match="got 0 tokens so far"):
        ticket.result(timeout=-1.0)
    assert ticket.result(timeout=60.0).tokens == world.cases[0].tokens


def test_stages_are_timed_where_asked(world, engine_of):
    engine = engine_of(profile=True)
    answer = engine.submit(world.cases[0].request).result()
    stages = engine.stage_seconds()
    assert list(stages) == ["vision", "prefix", "extract", "load", "prefill", "decode"]
    assert all(seconds > 0 for runs in stages.values() for seconds in runs)
    assert len(stages["decode"]) == len(answer.tokens) - 1
    assert sum(map(sum, stages.values())) < answer.seconds
    assert engine.stage_seconds() == {} == engine_of().stage_seconds()


def test_a_salt_makes_other_keys(world, engine_of):
    store = MemoryStore(1 << 26)
    picture = world.cases[0].request.images
    for salt in (None, "a tenant", "another"):
        with engine_of(store, salt=salt) as engine:
            engine.compress(picture)
    assert len(store) == 3


def test_a_file_that_is_open_may_come_in_several_requests(world, engine_of, tmp_path):
    tiny.picture(5, (900, 900)).save(tmp_path / "photo.png")
    for _ in range(5):
        photo = Image.open(tmp_path / "photo.png")
        answers = engine_of(max_batch=4).answer_many([Request(photo, [70, 90])] * 4)
        assert [answer.error for answer in answers] == [None] * 4
        assert len({answer.tokens for answer in answers}) == 1


def test_a_piece_is_never_half_a_character(world, engine_of):
    """Each byte is a token here; a character's bytes are sent once the last has arrived."""
    engine = engine_of()
    written = world.processor.tokenizer("né€", add_special_tokens=False)["input_ids"]
    ticket = engine.submit(world.cases[0].request)
    pieces = []
    for token in written:
        ticket.tokens.append(token)
        pieces.append(ticket._safe_text())
    assert pieces == ["n", "n", "né", "né", "né", "né€"]


def test_rows_close_ranks_when_most_have_left(world, engine_of):
    """Of four requests in a batch, the last one left, in the last row, continues in a batch of one."""
    engine = engine_of(max_batch=4)
    short = [
        replace(world.cases[i].request, sampling=Sampling(max_new_tokens=2)) for i in (0, 2, 4)
    ]
    tickets = [engine.submit(request) for request in short]
    last = engine.submit(world.cases[1].request)
    counts = []
    real = engine._second._decode
    engine._second._decode = lambda count, *rest: counts.append(count) or real(count, *rest)
    assert last.result().tokens == world.cases[1].tokens
    assert all(len(ticket.result().tokens) == 2 for ticket in tickets)
    assert counts[0] == 4 and counts[-1] == 1
