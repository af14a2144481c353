"""Batch plans: which samples make a step, and their assignment to ranks and micro-batches.

A step takes the next ``global_batch`` samples of a shuffled epoch. This depends neither on the number of
GPUs nor on the layout: packed or padded, one process or eight train on the same samples in the same
steps. Within a step

* packed: each sample, longest first, goes to the micro-batch with the fewest tokens so far. No
  micro-batch may exceed ``max_tokens``. Packed rows have no padding, so only balance between ranks
  remains to be gained.
* padded: samples are sorted by length and split into groups of equal size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# micro_batches[accumulation step][rank]: indices of samples.
Step = list[list[list[int]]]


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of an epoch are batched; the same on every rank.

    Attributes:
        lengths: tokens of each sample; 0 for an unused one.
        global_batch: samples per step.
        accumulation: micro-batches per rank and step.
        max_tokens: most tokens of a packed micro-batch; None for padded ones.
    """

    lengths: np.ndarray
    global_batch: int
    world_size: int
    accumulation: int
    max_tokens: int | None
    seed: int

    @property
    def num_steps(self) -> int:
        """Number of steps per epoch; the last one may have fewer samples."""
        return -(-int((self.lengths > 0).sum()) // self.global_batch)

    def order(self, epoch: int) -> np.ndarray:
        usable = np.flatnonzero(self.lengths > 0)
        return np.random.default_rng([self.seed, epoch]).permutation(usable)

    def step(self, samples: Sequence[int]) -> Step:
        """Arrange the samples of one step."""
        count = self.world_size * self.accumulation
        if self.max_tokens is not None:
            groups = spread(self.lengths, samples, count)
            # The fullest run at the same time: a micro-batch takes as long as its slowest rank.
            groups.sort(key=lambda group: -int(self.lengths[group].sum()))
        else:
            groups = runs(self.lengths, samples, count)
        world = self.world_size
        return [groups[i : i + world] for i in range(0, count, world)]

    def steps(self, epoch: int):
        """Each step of an epoch, arranged."""
        order = self.order(epoch)
        for start in range(0, len(order), self.global_batch):
            yield self.step(order[start : start + self.global_batch].tolist())


def spread(lengths: np.ndarray, samples: Sequence[int], count: int) -> list[list[int]]:
    """``count`` groups with about equal numbers of tokens: longest sample first, into the emptiest."""
    heap = [(0, group) for group in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        tokens, group = heapq.heappop(heap)
        groups[group].append(sample)
        heapq.heappush(heap, (tokens + int(lengths[sample]), group))
    return groups


def runs(lengths: np.ndarray, samples: Sequence[int], count: int) -> list[list[int]]:
    """``count`` groups of equal size (the last ones have one sample less) and similar lengths."""
    ordered = sorted(samples, key=lambda i: (-lengths[i], i))
    return [part.tolist() for part in np.array_split(np.array(ordered, dtype=np.int64), count)]


def packed_accumulation(
    lengths: np.ndarray,
    *,
    global_batch: int,
    world_size: int,
    max_tokens: int,
    seed: int,
    epochs: int,
) -> int:
    """The fewest micro-batches per rank and step with which every step of every epoch fits.

    Raises:
        ValueError: a sample longer than ``max_tokens``.
    """
    longest = int(lengths.max(initial=0))
    if longest > max_tokens:
        raise ValueError(
            f"expected batch.max_tokens of at least the longest sample, {longest} tokens, got "
            f"{max_tokens}; raise it, or lower data.max_length"
        )
    accumulation = 1
    for epoch in range(epochs):
        plan = BatchPlan(lengths, global_batch, world_size, 1, max_tokens, seed)
        order = plan.order(epoch)
        for start in range(0, len(order), global_batch):
            samples = order[start : start + global_batch].tolist()
            while not _fits(lengths, samples, world_size * accumulation, max_tokens):
                accumulation += 1
    return accumulation


def _fits(lengths: np.ndarray, samples: list[int], count: int, max_tokens: int) -> bool:
    if int(lengths[samples].sum()) > count * max_tokens:
        return False
    return all(int(lengths[group].sum()) <= max_tokens for group in spread(lengths, samples, count))


def padded_accumulation(global_batch: int, world_size: int, rows: int) -> int:
    """Number of micro-batches per rank and step.

    Raises:
        ValueError: a global batch that doesn't divide into micro-batches.
    """
    if global_batch % (world_size * rows):
        raise ValueError(
            f"expected batch.global_size as a multiple of batch.rows times processes, got "
            f"{global_batch} with {rows} rows on {world_size} processes; change batch.rows"
        )
    return global_batch // (world_size * rows)
