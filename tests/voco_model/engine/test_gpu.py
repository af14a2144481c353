"""On a GPU, CUDA graphs, compiled layers and a lagging host give the same tokens."""

from __future__ import annotations

import pytest
import torch

import voco_model
from tests.voco_model.engine.conftest import NEW_TOKENS
from voco_model.kv_store.memory_store import MemoryStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu(world):
    """The world's model on the GPU, in float32 without TF32, to compare with its answers on the CPU."""
    both = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in both]
    for backend in both:
        backend.allow_tf32 = False
    world.model.cuda()
    yield world
    world.model.cpu()
    for backend, value in zip(both, before, strict=True):
        backend.allow_tf32 = value


def keys_of(world) -> list[list[str]]:
    """Keys for the images: the machine may lack the library that hashes pixels."""
    names: dict[int, str] = {}
    keys = []
    for case in world.cases:
        images = case.request.images
        each = [] if images is None else images if isinstance(images, list) else [images]
        keys.append([names.setdefault(id(image), f"{len(names):064x}") for image in each])
    return keys


@pytest.mark.parametrize("mode", ["voco", "full_cache", "uncached"])
@pytest.mark.parametrize("graphs, compiled", [(False, False), (True, False), (True, True)])
def test_tokens_are_those_of_the_cpu(on_gpu, mode, graphs, compiled):
    store = MemoryStore(1 << 28, fingerprint="test")
    engine = voco_model.TwoPassEngine(
        on_gpu.model,
        on_gpu.processor,
        store,
        max_batch=4,
        max_new_tokens=NEW_TOKENS,
        max_prompt_tokens=500,
        mode=mode,
        fingerprint="test",
        graphs=graphs,
        compiled=compiled,
    )
    chosen = [
        (case, key)
        for case, key in zip(on_gpu.cases, keys_of(on_gpu), strict=True)
        if mode != "full_cache" or len(key) < 2
    ]
    requests = [
        voco_model.Request(case.request.images, case.request.text, case.request.sampling, key)
        for case, key in chosen
    ]
    first = engine.answer_many(requests)
    engine.flush()
    again = engine.answer_many(requests)
    assert [answer.error for answer in first + again] == [None] * (2 * len(requests))
    assert [answer.tokens for answer in again] == [answer.tokens for answer in first]
    if mode == "voco":
        assert [answer.tokens for answer in first] == [case.tokens for case, _ in chosen]
        assert all(
            answer.from_store == len(key) for answer, (_, key) in zip(again, chosen, strict=True)
        )
    if graphs:
        recorded = engine.stats().graphs
        engine.answer_many(requests)
        assert engine.stats().graphs == recorded, "nothing is recorded twice"


def test_warming_up_records_what_is_then_used(on_gpu):
    engine = voco_model.TwoPassEngine(
        on_gpu.model,
        on_gpu.processor,
        max_batch=2,
        max_new_tokens=4,
        max_prompt_tokens=60,
        compiled=False,
    )
    recorded = engine.warmup(text_tokens=[2])
    answer = engine.submit(on_gpu.cases[0].request).result()
    assert answer.tokens == on_gpu.cases[0].tokens[:4]
    assert engine.stats().graphs == recorded


def test_decoding_does_not_wait_for_the_device(on_gpu):
    """A step is launched without a synchronization, which would make torch raise here."""
    engine = voco_model.TwoPassEngine(
        on_gpu.model,
        on_gpu.processor,
        max_batch=2,
        max_new_tokens=NEW_TOKENS,
        compiled=False,
        lag=8,
    )
    ticket = engine.submit(on_gpu.cases[0].request)
    engine.step()
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with engine._scheduler._on_stream(), torch.no_grad():
            engine._second.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ticket.result().tokens == on_gpu.cases[0].tokens
