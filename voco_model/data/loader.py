"""Batches for one rank: which samples come next, with how many VoCo tokens, read by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from voco_model.data.encode import Encoded, Encoder
from voco_model.data.faults import DataError, Fault
from voco_model.data.index import Samples
from voco_model.data.plan import BatchPlan


class Key(NamedTuple):
    """What a worker is asked for."""

    sample: int
    num_voco: int


class Documents(Dataset):
    """Samples, encoded when they are asked for.

    What is found only when an image is decoded comes as a ``Fault``: whether it is fatal is for the
    process that trains to say, which can say it without a worker's traceback around it.
    """

    def __init__(self, samples: Samples, encoder: Encoder) -> None:
        self._samples, self._encoder = samples, encoder

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Encoded | Fault:
        try:
            return self._encoder.encode(self._samples[key.sample], key.num_voco)
        except DataError as error:
            return error.fault

    def __getitems__(self, keys: Sequence[Key]) -> list[Encoded | Fault]:
        return [self[key] for key in keys]  # none at all is a batch too: of a filler


class RankBatches(Sampler):
    """The micro-batches of one rank, an epoch after the other.

    Args:
        num_voco: VoCo tokens an image; of several, each step draws one, for all ranks.
    """

    def __init__(self, plan: BatchPlan, rank: int, num_voco: Sequence[int]) -> None:
        self._plan, self._rank, self._num_voco = plan, rank, list(num_voco)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._plan.num_steps * self._plan.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        draw = np.random.default_rng([self._plan.seed, self._epoch, 1])
        for step in self._plan.steps(self._epoch):
            num_voco = self._num_voco[int(draw.integers(len(self._num_voco)))]
            for ranks in step:
                yield [Key(sample, num_voco) for sample in ranks[self._rank]]


class RankLoader(DataLoader):
    """A DataLoader that tells its batch sampler the epoch, as the Trainer does."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
