"""Batches from a stream of ``datasets``, whose number of records and their lengths are unknown."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from voco_model.data.encode import Encoder
from voco_model.data.faults import DataError, Fault, FaultPolicy
from voco_model.data.index import loose_turns
from voco_model.data.plan import BatchPlan
from voco_model.data.records import undecoded
from voco_model.data.samples import Sample, sample_of


class StreamedBatches(IterableDataset):
    """The micro-batches of one rank, without end: each pass over the stream is shuffled anew.

    Every rank and every worker reads all records' text and makes the same plan; only the worker that
    yields a micro-batch decodes its images. Each sample is thus trained on once per pass, for any number
    of ranks and workers. A step takes ``global_batch`` samples, or as many as fit its micro-batches;
    the rest come first in the next step.

    Args:
        stream: a ``datasets.IterableDataset``, or an iterable of records with ``set_epoch``.
        name: name of the stream, for errors.
        accumulation: micro-batches per rank and step.
        num_voco: as in ``RankBatches``.

    Attributes:
        skip: number of micro-batches to skip, when a run resumes.
    """

    def __init__(
        self,
        stream,
        name: str,
        folder: Path,
        encoder: Encoder,
        policy: FaultPolicy,
        collate: Callable,
        *,
        global_batch: int,
        world_size: int,
        rank: int,
        accumulation: int,
        max_tokens: int | None,
        seed: int,
        num_voco: Sequence[int],
        max_frames: int = 8,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self._stream = undecoded(stream)
        self._name, self._folder, self._max_frames = name, folder, max_frames
        self._encoder, self._policy, self._collate = encoder, policy, collate
        self._global_batch, self._world_size, self._rank = global_batch, world_size, rank
        self._accumulation, self._max_tokens, self._seed = accumulation, max_tokens, seed
        self._num_voco, self._shuffle_buffer = list(num_voco), shuffle_buffer
        self.skip = 0

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        draw = np.random.default_rng([self._seed, 1])
        for number, (samples, faults) in enumerate(self._micro_batches()):
            if number % self._accumulation == 0:  # a step begins
                num_voco = self._num_voco[int(draw.integers(len(self._num_voco)))]
            if number >= self.skip and (number - self.skip) % workers == worker:
                yield self._collate(
                    [*(self._read(sample, num_voco) for sample in samples), *faults]
                )

    def lengths(self) -> Iterator[int]:
        """Lengths of the stream's usable samples, in order."""
        return (item[1] for item in self._measured() if not isinstance(item, Fault))

    def _read(self, sample: Sample, num_voco: int):
        try:
            return self._encoder.encode(sample, num_voco)
        except DataError as error:
            return error.fault

    def _micro_batches(self) -> Iterator[tuple[list[Sample], list[Fault]]]:
        """This rank's micro-batches; new faults are returned with the first one of a step."""
        waiting: deque[tuple[Sample, int]] = deque()
        faults: list[Fault] = []
        for item in self._measured():
            if isinstance(item, Fault):
                faults.append(item)
                continue
            waiting.append(item)
            if len(waiting) < self._global_batch:
                continue
            step = self._step(waiting)
            for ranks in step:
                yield ranks[self._rank], faults
                faults = []

    def _step(self, waiting: deque[tuple[Sample, int]]) -> list[list[list[Sample]]]:
        taken = [waiting.popleft() for _ in range(self._global_batch)]
        while True:
            lengths = np.array([length for _, length in taken])
            plan = BatchPlan(
                lengths,
                len(taken),
                self._world_size,
                self._accumulation,
                self._max_tokens,
                self._seed,
            )
            step = plan.step(range(len(taken)))
            fullest = max(int(lengths[group].sum()) for ranks in step for group in ranks)
            if self._max_tokens is None or fullest <= self._max_tokens:
                return [[[taken[i][0] for i in group] for group in ranks] for ranks in step]
            waiting.appendleft(taken.pop())

    def _records(self, epoch: int) -> Iterator[dict]:
        """All records of a pass, in the same order on every rank and worker."""
        stream = self._stream
        if hasattr(stream, "shuffle"):
            # Not set_epoch: worker processes share its epoch, but may be in different passes.
            draw = np.random.default_rng([self._seed, 2, epoch])
            stream = stream.shuffle(generator=draw, buffer_size=self._shuffle_buffer)
        elif hasattr(stream, "set_epoch"):
            stream.set_epoch(epoch)
        if not hasattr(stream, "iter"):
            yield from stream
            return
        # Iterating over the data set itself would split it between worker processes.
        for one in stream.iter(batch_size=1):
            yield {name: values[0] for name, values in one.items()}

    def _measured(self) -> Iterator[tuple[Sample, int] | Fault]:
        """Samples with their lengths, pass after pass; faults are repeated in each pass."""
        largest = max(self._num_voco)
        epoch = 0
        while True:
            usable = 0
            for row, record in enumerate(self._records(epoch)):
                name = record.get("id")  # the order of rows changes with each pass
                where = f"{self._name}[{row if name is None else name}]"
                try:
                    sample = sample_of(record, where, self._folder, self._max_frames)
                    length = self._encoder.length(sample, largest)
                except DataError as error:
                    if self._policy[error.fault.kind] == "fatal":
                        raise
                    yield error.fault
                    continue
                if sample.loose:
                    yield loose_turns(sample)
                    if self._policy["loose_turns"] == "skip":
                        continue
                if length > self._encoder.max_length:
                    said = f"expected at most {self._encoder.max_length} tokens, got {length}"
                    fault = Fault("over_long", where, said)
                    action = self._policy["over_long"]
                    if action == "fatal":
                        raise DataError(fault.kind, fault.where, fault.message)
                    yield fault
                    if action == "skip":
                        continue
                    length = self._encoder.max_length
                usable += 1
                yield sample, length
            if not usable:
                raise ValueError(f"expected samples in {self._name}, got none that can be used")
            epoch += 1
