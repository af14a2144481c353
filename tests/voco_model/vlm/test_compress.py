"""``compress`` with a store behind it."""

from __future__ import annotations

import logging

import pytest
import torch

import voco_model
from tests.voco_model import tiny
from voco_model.kv_store.memory_store import MemoryStore

STEPS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def setting(kind):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    with voco_model.enable(model, processor, num_voco=2):
        yield model, processor


@pytest.fixture
def passes(setting):
    """How many images each first pass reads."""
    model, _ = setting
    read = []

    def count(module, args, kwargs, output):
        read.append(len(kwargs["inputs_embeds"]))

    count.voco_fingerprint = ""
    hook = model.model.language_model.register_forward_hook(count, with_kwargs=True)
    yield read
    hook.remove()


def test_an_image_is_read_once(setting, passes):
    model, processor = setting
    a, b, c = map(tiny.picture, range(3))
    alone = voco_model.compress(model, [a, b, c], processor=processor)
    passes.clear()
    store = MemoryStore(1 << 20)
    first = voco_model.compress(model, [a, b, a], processor=processor, store=store)
    assert passes == [2]
    second = voco_model.compress(model, iter([c, b, a]), processor=processor, store=store)
    assert passes == [2, 1]
    expected = [alone[0], alone[1], alone[0], alone[2], alone[1], alone[0]]
    for entry, want in zip(first + second, expected, strict=True):
        torch.testing.assert_close(entry.kv, want.kv, rtol=0, atol=1e-5)  # batches of other sizes
        assert entry.positions.equal(want.positions)
        assert entry.next_position == want.next_position
        assert entry.rope.same(want.rope)
        assert entry.fingerprint == voco_model.fingerprint(model)
        assert entry.key in store
    stats = store.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.puts) == (3, 2, 3, 3)
    tokens = voco_model.generate(model, second, "Who?", processor=processor, **STEPS)
    assert tokens.shape == (3, 4)


def test_other_weights_and_other_tenants_read_it_again(setting, passes):
    model, processor = setting
    store = MemoryStore(1 << 20)
    picture = tiny.picture(0)

    def compress(**options):
        (entry,) = voco_model.compress(model, picture, processor=processor, store=store, **options)
        return entry.key

    keys = [compress(), compress(salt="a"), compress(salt="b"), compress(num_voco=3)]
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] += 1
    keys.append(compress())
    assert len(set(keys)) == 5 and passes == [1] * 5


def test_a_store_that_can_not_keep_an_entry_costs_no_answer(setting, caplog):
    model, processor = setting

    class Full(MemoryStore):
        def put(self, entry, key=None):
            raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING):
        (entry,) = voco_model.compress(
            model, tiny.picture(0), processor=processor, store=Full(1 << 20)
        )
    assert entry.num_tokens == 2
    assert "could not be stored: [Errno 28] No space left on device" in caplog.text


def test_an_entry_that_is_too_large_for_the_store_is_returned(setting, caplog):
    model, processor = setting
    with caplog.at_level(logging.WARNING):
        (entry,) = voco_model.compress(
            model, tiny.picture(0), processor=processor, store=MemoryStore(10)
        )
    assert entry.num_tokens == 2 and "could not be stored: expected an entry" in caplog.text


def test_says_what_a_store_needs(setting):
    model, processor = setting
    store = MemoryStore(1 << 20)
    with pytest.raises(ValueError, match="expected a salt only with a store"):
        voco_model.compress(model, tiny.picture(0), processor=processor, salt="a")
    with pytest.raises(ValueError, match="expected a processor"):
        voco_model.compress(model, tiny.picture(0), store=store)
    with pytest.raises(ValueError, match="expected images with a store"):
        voco_model.compress(model, inputs={}, processor=processor, store=store)
