"""The index of a run's data: the length or the fault of each sample, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout

from voco_model.data.encode import Encoder
from voco_model.data.faults import DataError, Fault
from voco_model.data.records import Records
from voco_model.data.samples import Sample, sample_of

logger = logging.getLogger(__name__)

_CHUNK = 256
_PATIENCE = 60.0  # seconds between messages while another process makes the index
_READING = 2  # incremented when samples are read differently, which makes kept lengths wrong


@dataclass(frozen=True)
class Source:
    """Records and the folder of their images."""

    records: Records
    folder: Path
    max_frames: int = 8


@dataclass(frozen=True)
class Index:
    """Attributes:
    lengths: int32, tokens of each sample with the most VoCo tokens, after cutting to ``max_length``;
        0 for an unusable sample.
    faults: faults of the samples, including over-long ones that are cut.
    """

    lengths: np.ndarray
    faults: list[Fault]


class Samples:
    """The samples of several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(source.records) for source in self._sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """Raises ``DataError``."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, row = self._sources[number], int(index - self._starts[number])
        record = source.records[row]
        return sample_of(record, source.records.where(row), source.folder, source.max_frames)

    def state(self) -> str:
        return json.dumps([[s.records.state(), str(s.folder), s.max_frames] for s in self._sources])


def make_index(
    samples: Samples,
    encoder: Encoder,
    num_voco: int,
    *,
    truncate: bool,
    trim: bool = True,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Check every sample once: tokenize its text and read the headers of its images.

    Args:
        truncate: cut over-long samples instead of skipping them.
        trim: use samples without their loose turns instead of skipping them.
        workers: number of worker processes; 0 for none.
        progress: called with the number of samples done and of all samples.

    Raises:
        OSError: a worker process was killed.
    """
    starts = range(0, len(samples), _CHUNK)
    arguments = (samples, encoder, num_voco, truncate, trim)
    lengths, faults = [], []

    def gather(results) -> None:
        for found, wrong in results:
            lengths.extend(found)
            faults.extend(wrong)
            if progress is not None:
                progress(len(lengths), len(samples))

    if workers > 1 and len(starts) > 1:
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_begin, initargs=arguments
        ) as pool:
            try:
                gather(pool.map(_measured, starts))
            except BrokenProcessPool as error:
                raise OSError(
                    f"checking the data failed after sample {len(lengths)} of {len(samples)}: a worker "
                    "process was killed, perhaps because memory ran out; lower data.workers"
                ) from error
    else:
        _begin(*arguments)
        gather(map(_measured, starts))
    return Index(np.array(lengths, dtype=np.int32), faults)


_job: tuple[Samples, Encoder, int, bool, bool]


def _begin(*arguments) -> None:
    global _job
    _job = arguments


def _measured(start: int) -> tuple[list[int], list[Fault]]:
    samples, encoder, num_voco, truncate, trim = _job
    lengths, faults = [], []
    for index in range(start, min(start + _CHUNK, len(samples))):
        try:
            sample = samples[index]
            length = encoder.length(sample, num_voco)
        except DataError as error:
            lengths.append(0)
            faults.append(error.fault)
            continue
        if length > encoder.max_length:
            said = f"expected at most {encoder.max_length} tokens, got {length}"
            faults.append(Fault("over_long", sample.where, said))
            length = encoder.max_length if truncate else 0
        if sample.loose:
            faults.append(loose_turns(sample))
            length = length if trim else 0
        lengths.append(length)
    return lengths, faults


def loose_turns(sample: Sample) -> Fault:
    said = f"expected questions and answers in pairs, got {sample.loose} turns without a partner"
    return Fault("loose_turns", sample.where, said)


def kept_index(folder: Path, key: str, make: Callable[[], Index]) -> Index:
    """The folder's index for this key, made and saved there if it is missing.

    Of several processes one makes it; the others wait, and log that once a minute.
    """
    name = hashlib.sha256(f"{_READING} {key}".encode()).hexdigest()[:16]
    path = folder / f"index-{name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "index.lock"):
        if path.is_file():
            try:
                return _read(path)
            except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
                # A crash of the machine can leave the file without its content.
                logger.warning("reading %s failed, making it again: %s", path, error)
        index = make()
        partial = folder / f"index-{name}.partial.npz"
        written = json.dumps([asdict(fault) for fault in index.faults])
        np.savez(partial, lengths=index.lengths, faults=np.array(written))
        os.replace(partial, path)
    return index


def _read(path: Path) -> Index:
    with np.load(path) as kept:
        faults = [Fault(**fault) for fault in json.loads(str(kept["faults"]))]
        return Index(kept["lengths"], faults)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=_PATIENCE)
            break
        except Timeout:
            logger.warning(
                "waiting for another process that checks the data and holds %s; if none of your runs "
                "does, another one is stopped or hangs",
                path,
            )
    try:
        yield
    finally:
        lock.release()
