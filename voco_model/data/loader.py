"""The data loader of one rank: its samples in order, with their number of VoCo tokens."""

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
    """What a worker process reads: a sample, encoded with this many VoCo tokens."""

    sample: int
    num_voco: int


class Documents(Dataset):
    """Samples, encoded on access.

    A fault that only decoding finds is returned as a ``Fault``. The training process decides whether it
    is fatal, and can report it without a worker's traceback.
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
        return [self[key] for key in keys]  # an empty batch gets a filler


class RankBatches(Sampler):
    """The micro-batches of one rank, epoch by epoch.

    Args:
        num_voco: numbers of VoCo tokens per image; each step draws one, the same on all ranks.
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
    """A DataLoader whose ``set_epoch``, which the Trainer calls, reaches the batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
