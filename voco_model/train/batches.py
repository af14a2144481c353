"""The batches of a run: checks the samples, plans the steps, and makes the loader of one rank."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from voco_model.data.collate import Collator
from voco_model.data.encode import Encoder
from voco_model.data.faults import Fault, FaultPolicy
from voco_model.data.index import Index, Samples, Source, kept_index, make_index
from voco_model.data.loader import Documents, RankBatches, RankLoader
from voco_model.data.plan import BatchPlan, packed_accumulation, padded_accumulation
from voco_model.data.records import load_dataset_of, open_records
from voco_model.data.stream import StreamedBatches
from voco_model.train.config import TrainConfig

# The first samples of a stream give the mean length, and steps get a margin above it.
_PEEKED = 512
_MARGIN = 1.1


@dataclass(frozen=True)
class Batches:
    """Attributes:
    loader: this rank's batches.
    accumulation: micro-batches per rank and step.
    steps: steps per epoch; None for a stream.
    samples: number of usable samples; None for a stream.
    tokens: tokens per epoch; None for a stream.
    faults: samples that are skipped or cut, as far as is known before training.
    digest: hash of the samples' lengths, to recognize other data; empty for a stream.
    """

    loader: DataLoader
    accumulation: int
    steps: int | None
    samples: int | None
    tokens: int | None
    faults: list[Fault]
    digest: str = ""


def make_batches(
    config: TrainConfig,
    processor,
    *,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Batches:
    """Check the data, or read the result of an earlier check, and plan the batches.

    Args:
        processor: a processor with ``<VoCo>`` in its tokenizer.
        progress: called with the number of samples checked and of all samples.

    Raises:
        ValueError: samples with fatal faults, no usable samples, or batches that can't be made.
    """
    encoder = Encoder(
        processor,
        config.prompt,
        config.data.max_length,
        ground=config.data.ground,
        limits=config.data.limits,
    )
    policy = FaultPolicy(config.data.faults)
    tokenizer = processor.tokenizer
    collate = Collator(
        packed=config.batch.packed,
        pad_token_id=tokenizer.pad_token_id or 0,
        filler=encoder.filler(config.voco.most),
        always_image=world_size > 1,
        voco_token_id=tokenizer.voco_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        isolated=config.voco.isolated,
    )
    if config.data.streaming:
        return _streamed(config, encoder, policy, collate, rank, world_size)
    samples = Samples(
        [
            Source(open_records(source.path, source.split), source.images, source.max_frames)
            for source in config.data.sources
        ]
    )
    truncate = policy["over_long"] == "truncate"
    key = [
        samples.state(),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        processor.image_processor.to_json_string(),
        config.prompt,
        config.data.max_length,
        config.data.limits,
        "upright",  # how sizes of images are read, which older indexes did without rotation
        config.voco.most,
        truncate,
        policy["loose_turns"] == "trim",
    ]

    def checked() -> Index:
        index = make_index(
            samples,
            encoder,
            config.voco.most,
            truncate=truncate,
            trim=policy["loose_turns"] == "trim",
            workers=config.data.num_workers,
            progress=progress,
        )
        policy.check(index.faults)  # before saving: after a fatal fault, the data will be fixed
        return index

    index = kept_index(config.output / "data", repr(key), checked)
    policy.check(index.faults)  # a saved index may be from another policy
    if not (index.lengths > 0).any():
        raise ValueError(f"expected usable samples, got none among {len(samples)}")
    accumulation, max_tokens = _arrangement(config, index.lengths, world_size)
    plan = BatchPlan(
        index.lengths,
        config.batch.global_size,
        world_size,
        accumulation,
        max_tokens,
        config.seed,
    )
    loader = RankLoader(
        Documents(samples, encoder),
        batch_sampler=RankBatches(plan, rank, config.voco.choices),
        collate_fn=collate,
        **_reading(config),
    )
    used = int((index.lengths > 0).sum())
    tokens = int(index.lengths.sum(dtype=np.int64))
    digest = hashlib.sha256(index.lengths.tobytes()).hexdigest()
    return Batches(loader, accumulation, plan.num_steps, used, tokens, index.faults, digest)


def _arrangement(
    config: TrainConfig, lengths: np.ndarray, world_size: int
) -> tuple[int, int | None]:
    batch = config.batch
    if not batch.packed:
        return padded_accumulation(batch.global_size, world_size, batch.rows), None
    epochs = config.optimizer.epochs
    if config.optimizer.steps is not None:
        num_steps = -(-int((lengths > 0).sum()) // batch.global_size)
        epochs = -(-config.optimizer.steps // num_steps)
    accumulation = packed_accumulation(
        lengths,
        global_batch=batch.global_size,
        world_size=world_size,
        max_tokens=batch.max_tokens,
        seed=config.seed,
        epochs=epochs,
    )
    return accumulation, batch.max_tokens


def _streamed(config, encoder, policy, collate, rank: int, world_size: int) -> Batches:
    batch = config.batch
    if config.optimizer.steps is None:
        raise ValueError(
            "expected optimizer.steps with data.streaming, whose length is unknown, got none"
        )
    if len(config.data.sources) != 1:
        raise ValueError(
            f"expected one source with data.streaming, got {len(config.data.sources)}; turn them into "
            "one data set, or set streaming: false"
        )
    source = config.data.sources[0]
    stream = load_dataset_of(source.path, source.split, streaming=True)

    def batches(accumulation: int) -> StreamedBatches:
        return StreamedBatches(
            stream,
            source.path,
            source.images,
            encoder,
            policy,
            collate,
            global_batch=batch.global_size,
            world_size=world_size,
            rank=rank,
            accumulation=accumulation,
            max_tokens=batch.max_tokens if batch.packed else None,
            seed=config.seed,
            num_voco=config.voco.choices,
            max_frames=source.max_frames,
        )

    if batch.packed:
        if config.data.max_length > batch.max_tokens:
            raise ValueError(
                f"expected batch.max_tokens of at least data.max_length {config.data.max_length}, got "
                f"{batch.max_tokens}"
            )
        lengths = list(itertools.islice(batches(1).lengths(), _PEEKED))
        wanted = float(np.mean(lengths)) * batch.global_size * _MARGIN
        accumulation = max(1, math.ceil(wanted / (world_size * batch.max_tokens)))
    else:
        accumulation = padded_accumulation(batch.global_size, world_size, batch.rows)
    loader = DataLoader(batches(accumulation), batch_size=None, **_reading(config))
    return Batches(loader, accumulation, None, None, None, [])


def _reading(config: TrainConfig) -> dict:
    workers = config.data.num_workers
    more = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return {"num_workers": workers, "pin_memory": torch.cuda.is_available(), **more}
