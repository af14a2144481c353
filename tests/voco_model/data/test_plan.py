"""Which sample goes where: the same ones in the same steps, however many processes there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.voco_model import instruction, tiny
from voco_model.data.collate import STATS, Collator
from voco_model.data.encode import Encoder
from voco_model.data.index import Samples, Source, make_index
from voco_model.data.loader import Documents, RankBatches, RankLoader
from voco_model.data.plan import BatchPlan, packed_accumulation, padded_accumulation
from voco_model.data.records import FileRecords

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=80).map(
    lambda lengths: np.array(lengths, dtype=np.int32)
)
GLOBAL_BATCH = st.integers(1, 24)
WORLD = st.sampled_from([1, 2, 4])
SEED = st.integers(0, 2**31)
LIMIT = st.none() | st.integers(60, 300)


def by_step(plan: BatchPlan, epoch: int) -> list[list[int]]:
    """The samples of each step, sorted."""
    return [
        sorted(i for ranks in step for group in ranks for i in group) for step in plan.steps(epoch)
    ]


@settings(deadline=None)
@given(LENGTHS, GLOBAL_BATCH, WORLD, st.integers(1, 4), LIMIT, SEED)
def test_an_epoch_has_every_usable_sample_once(
    lengths, global_batch, world_size, accumulation, max_tokens, seed
):
    plan = BatchPlan(lengths, global_batch, world_size, accumulation, max_tokens, seed)
    usable = np.flatnonzero(lengths).tolist()
    for epoch in range(2):
        steps = list(plan.steps(epoch))
        assert len(steps) == plan.num_steps == -(-len(usable) // global_batch)
        assert all(len(step) == accumulation for step in steps)
        assert all(len(ranks) == world_size for step in steps for ranks in step)
        assert sorted(sum(by_step(plan, epoch), [])) == usable
        assert all(len(samples) == global_batch for samples in by_step(plan, epoch)[:-1])
        ranks = [RankBatches(plan, rank, [1]) for rank in range(world_size)]
        for rank in ranks:
            rank.set_epoch(epoch)
            assert len(rank) == len(list(rank)) == plan.num_steps * accumulation
        assert sorted(key.sample for rank in ranks for keys in rank for key in keys) == usable


@settings(deadline=None)
@given(LENGTHS, GLOBAL_BATCH, SEED)
def test_steps_have_the_same_samples_however_they_are_arranged(lengths, global_batch, seed):
    arranged = [
        BatchPlan(lengths, global_batch, world_size, accumulation, max_tokens, seed)
        for world_size in (1, 2, 4)
        for accumulation in (1, 3)
        for max_tokens in (None, 100)
    ]
    for epoch in range(2):
        steps = [by_step(plan, epoch) for plan in arranged]
        assert all(other == steps[0] for other in steps)


@settings(deadline=None)
@given(LENGTHS.filter(np.any), GLOBAL_BATCH, WORLD, st.integers(60, 300), SEED)
def test_packed_micro_batches_hold_no_more_than_they_may(
    lengths, global_batch, world_size, max_tokens, seed
):
    epochs = 3
    accumulation = packed_accumulation(
        lengths,
        global_batch=global_batch,
        world_size=world_size,
        max_tokens=max_tokens,
        seed=seed,
        epochs=epochs,
    )

    def fullest(accumulation: int) -> int:
        plan = BatchPlan(lengths, global_batch, world_size, accumulation, max_tokens, seed)
        return max(
            int(lengths[group].sum())
            for epoch in range(epochs)
            for step in plan.steps(epoch)
            for ranks in step
            for group in ranks
        )

    assert fullest(accumulation) <= max_tokens
    assert accumulation == 1 or fullest(accumulation - 1) > max_tokens  # and no more of them


@settings(deadline=None)
@given(LENGTHS, WORLD, st.integers(1, 3), LIMIT)
def test_padded_groups_are_of_equal_size_and_similar_length(
    lengths, world_size, accumulation, max_tokens
):
    plan = BatchPlan(lengths, 12, world_size, accumulation, None, 0)
    for step in plan.steps(0):
        groups = [group for ranks in step for group in ranks]
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1
        flat = [int(lengths[i]) for group in groups for i in group]
        assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_plans_are_seeded(max_tokens):
    lengths = np.random.default_rng(0).integers(1, 60, 100)

    def steps(seed: int, epoch: int) -> list:
        return list(BatchPlan(lengths, 16, 2, 4, max_tokens, seed).steps(epoch))

    assert steps(3, 0) == steps(3, 0)
    assert steps(3, 0) != steps(3, 1)
    assert steps(3, 0) != steps(4, 0)


def test_what_cannot_be_arranged_is_refused():
    lengths = np.array([10, 70, 0])
    with pytest.raises(ValueError, match="at least the longest sample, 70 tokens, got 60"):
        packed_accumulation(lengths, global_batch=2, world_size=1, max_tokens=60, seed=0, epochs=1)
    assert padded_accumulation(32, 2, 4) == 4
    for rows in (3, 64):
        with pytest.raises(ValueError, match=f"got 32 with {rows} rows on 2 processes"):
            padded_accumulation(32, 2, rows)


@pytest.fixture
def data(llava, tmp_path):
    """Documents of a file with images, a collator and a plan for two ranks."""
    path = instruction.write_data(tmp_path)
    samples = Samples([Source(FileRecords(path), tmp_path)])
    encoder = Encoder(llava, "vicuna", 450)
    index = make_index(samples, encoder, 4, truncate=True)
    assert index.faults == [] and (index.lengths > 0).all()
    collate = Collator(
        packed=True,
        pad_token_id=tiny.PAD,
        filler=encoder.filler(4),
        always_image=True,
        voco_token_id=tiny.VOCO,
        image_token_id=tiny.IMAGE,
    )
    plan = BatchPlan(index.lengths, 5, 2, 2, 2048, 0)
    return Documents(samples, encoder), collate, plan


@pytest.mark.parametrize("rank", [0, 1])
def test_worker_processes_change_nothing(data, rank):
    documents, collate, plan = data

    def batches(workers: int) -> list[dict]:
        loader = RankLoader(
            documents,
            batch_sampler=RankBatches(plan, rank, [1, 2, 4]),
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found += list(loader)
        return found

    here, elsewhere = batches(0), batches(2)
    assert len(here) == len(elsewhere) == 2 * 2 * plan.num_steps
    for one, other in zip(here, elsewhere, strict=True):
        assert one.keys() == other.keys()
        assert one.pop(STATS) == other.pop(STATS)
        assert all(value.equal(other[name]) for name, value in one.items())
    half = len(here) // 2
    first, second = ([b["input_ids"].tolist() for b in part] for part in (here[:half], here[half:]))
    assert first != second


def test_a_step_has_one_number_of_voco_tokens_on_all_ranks(data):
    documents, collate, plan = data
    ranks = [RankBatches(plan, rank, [1, 2, 4]) for rank in range(2)]
    drawn = []
    for epoch in range(2):
        for rank in ranks:
            rank.set_epoch(epoch)
        together = list(zip(*ranks, strict=True))
        for start in range(0, len(together), plan.accumulation):
            step = together[start : start + plan.accumulation]
            (number,) = {key.num_voco for micro in step for keys in micro for key in keys}
            drawn.append(number)
    assert set(drawn) == {1, 2, 4}
    half = len(drawn) // 2
    assert drawn[:half] != drawn[half:]  # each epoch draws anew
    for keys in list(ranks[0])[:4]:
        for key in keys:
            ids = documents[key].input_ids
            images = (ids == tiny.IMAGE).sum() // 16
            assert (ids == tiny.VOCO).sum() == images * key.num_voco


def test_a_rank_without_a_sample_gets_a_filler(data):
    documents, collate, plan = data
    few = BatchPlan(np.where(np.arange(len(plan.lengths)) == 3, plan.lengths, 0), 5, 2, 1, 2048, 0)
    loaders = [
        RankLoader(documents, batch_sampler=RankBatches(few, rank, [2]), collate_fn=collate)
        for rank in range(2)
    ]
    (full,), (empty,) = (list(loader) for loader in loaders)
    assert full[STATS].samples == 1 and empty[STATS].samples == 0
    assert (empty["labels"] == -100).all()
    assert torch.equal(empty["input_ids"][0], collate.filler.input_ids)
