"""Sampling: the distribution of draws, top-p, and reproducibility by seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from tests.voco_model.engine.conftest import inputs_of
from voco_model import Request, Sampling
from voco_model.engine.sampling import choose, uniform

DRAWS = 20_000


def drawn(logits: torch.Tensor, temperature: float, top_p: float, seed: int = 5) -> torch.Tensor:
    """How often each token was drawn, float ``[V]``."""
    rows = logits.expand(DRAWS, -1)
    ones = torch.ones(DRAWS)
    draws = uniform(torch.full((DRAWS,), seed), torch.arange(DRAWS))
    tokens = choose(rows, ones * temperature, ones * top_p, draws)
    return torch.bincount(tokens, minlength=logits.shape[-1]).float()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_tokens_are_drawn_as_often_as_they_should_be(temperature, top_p):
    logits = torch.tensor([[1.0, 3.0, -1.0, 2.5, 0.0, 2.9, -9.0]])
    kept = TopPLogitsWarper(top_p)(None, logits / temperature)
    expected = kept.softmax(-1)[0] * DRAWS
    counts = drawn(logits, temperature, top_p)
    assert counts[expected == 0].sum() == 0, "top-p keeps what transformers keeps"
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely].clamp(min=1)).sum()
    assert chi_square < 30  # at most 6 degrees of freedom: p = 1 / 25,000


def test_temperature_0_is_greedy_beside_rows_that_are_not():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 5.0]).repeat(32)
    tokens = choose(
        logits, temperature, torch.ones(64), uniform(torch.arange(64), torch.zeros(64).long())
    )
    greedy = logits.argmax(-1)
    assert torch.equal(tokens[::2], greedy[::2])
    assert not torch.equal(tokens[1::2], greedy[1::2])


def test_a_tiny_top_p_is_greedy():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    draws = uniform(torch.arange(64), torch.zeros(64).long())
    ones = torch.ones(64)
    assert torch.equal(choose(logits, ones, ones * 1e-6, draws), logits.argmax(-1))


def test_no_number_gives_an_index_out_of_range():
    """On a GPU an index out of range would end the process."""
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    logits = torch.cat([strange[:, None].expand(4, 5), torch.eye(5)])
    many = torch.full((9,), 0.5)
    for temperature in (0.0, 1e-30, 0.5, 1e38):
        for top_p in (1e-46, 1e-6, 1.0):
            tokens = choose(logits, torch.full((9,), temperature), torch.full((9,), top_p), many)
            assert ((tokens >= 0) & (tokens < 5)).all()
    assert choose(torch.eye(5), torch.ones(5), torch.full((5,), 1e-46), many[:5]).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_the_largest_draw_stays_within_what_is_kept():
    logits = torch.full((1, 1000), -20.0)
    logits[0, :3] = 1.0
    draw = torch.tensor([1 - 2.0**-24])
    assert choose(logits, torch.ones(1), torch.tensor([0.9]), draw) < 3


def test_draws_are_uniform_and_seeds_independent():
    many = uniform(torch.full((100_000,), 7), torch.arange(100_000))
    assert (many >= 0).all() and (many < 1).all()
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
    other = uniform(torch.full((100_000,), 8), torch.arange(100_000))
    assert abs(torch.corrcoef(torch.stack([many, other]))[0, 1]) < 0.02
    following = torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1]
    assert abs(following) < 0.02
    largest = torch.tensor([2**63 - 1])
    assert 0 <= uniform(largest, largest) < 1


def sampled(world, seed: int) -> Request:
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed, ignore_eos=True)
    request = world.cases[0].request
    return Request(request.images, request.text, sampling)


def test_a_seed_gives_one_answer_in_any_company(world, engine_of):
    alone = {
        seed: engine_of(max_batch=1).submit(sampled(world, seed)).result().tokens
        for seed in (1, 2, 3)
    }
    assert len(set(alone.values())) == 3
    requests = [world.cases[1].request, sampled(world, 2), world.cases[3].request]
    requests += [sampled(world, 3), sampled(world, 1)]
    answers = engine_of(max_batch=3).answer_many(requests)
    assert answers[1].tokens == alone[2]
    assert answers[3].tokens == alone[3]
    assert answers[4].tokens == alone[1]
    for index in (0, 2):  # greedy ones beside them
        assert answers[index].tokens == world.cases[1 + index].tokens


def test_a_seed_holds_where_rows_close_ranks(world, engine_of):
    (alone,) = engine_of(max_batch=1).answer_many([sampled(world, 1)])
    short = replace(world.cases[2].request, sampling=Sampling(max_new_tokens=2, ignore_eos=True))
    engine = engine_of(max_batch=4)
    *_, last = [engine.submit(request) for request in (short, short, short, sampled(world, 1))]
    assert last.result().tokens == alone.tokens


def test_without_a_seed_each_answer_is_another(world, engine_of):
    request = world.cases[0].request
    engine = engine_of()
    answers = {
        engine.answer(request.images, request.text, temperature=2.0, ignore_eos=True).tokens
        for _ in range(4)
    }
    assert len(answers) > 1


def test_suppressed_tokens_are_never_written(world, engine_of):
    case = world.cases[0]
    world.model.generation_config.suppress_tokens = [case.tokens[0]]
    try:
        answer = engine_of().submit(case.request).result()
        out = world.model.generate(
            **inputs_of(world.processor, [case.request]), max_new_tokens=10, do_sample=False
        )
        assert case.tokens[0] not in answer.tokens
        assert list(answer.tokens) == out[0, -len(answer.tokens) :].tolist()
    finally:
        world.model.generation_config.suppress_tokens = None


def test_numpys_integers_are_integers(world, engine_of):
    image, text = world.cases[0].request.images, world.cases[0].request.text
    plain = engine_of().answer(image, text, max_new_tokens=2, seed=3)
    given = [np.int64(token) for token in text]
    answer = engine_of().answer(image, given, max_new_tokens=np.int64(2), seed=np.int64(3))
    assert answer.tokens == plain.tokens
