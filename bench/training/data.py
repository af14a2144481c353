"""What bench/train.py trains on: samples drawn from a stated distribution, as padded or packed batches.

The lengths of texts are log-normal with a median of 200 tokens and a mean of 290, what is longer than
2048 is cut, and 6% of the samples have no image. It is shaped after LLaVA-665k (Liu et al., arXiv
2310.03744), of which 40k samples of 665k are text alone; it is assumed, not fitted to that data. Token
ids and pixels are noise. Labels are the last half of each text, the answer; the rest and everything
before the text has none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that Transformers' losses ignore."""

FIRST_TEXT_ID = 3
"""Ids below are the tokenizer's own."""


@dataclass(frozen=True)
class Distribution:
    """How texts and images are drawn.

    Attributes:
        median, mean: of the log-normal lengths of texts in tokens, before they are cut.
        shortest, longest: lengths are brought between them.
        text_only: share of samples without an image.
    """

    median: int = 200
    mean: int = 290
    shortest: int = 8
    longest: int = 2048
    text_only: float = 0.06

    @property
    def sigma(self) -> float:
        """Standard deviation of the lengths' logarithms: a log-normal's mean is its median times
        ``exp(sigma^2 / 2)``."""
        return math.sqrt(2 * math.log(self.mean / self.median))

    def to_json(self) -> dict:
        return {
            "lengths": "log-normal",
            "median": self.median,
            "mean": self.mean,
            "sigma": self.sigma,
            "shortest": self.shortest,
            "longest": self.longest,
            "text_only": self.text_only,
            "labels": "the last half of each text",
        }


@dataclass(frozen=True)
class Sample:
    """One conversation: its text int64 ``[T]``, and whether an image precedes it."""

    text: Tensor
    image: bool


def draw(
    distribution: Distribution,
    count: int,
    *,
    prefix: int,
    first_special_id: int,
    seed: int = 0,
    candidates: int = 999,
) -> list[Sample]:
    """A typical batch: of many that are drawn, the one with the median share of padding.

    Args:
        count: samples of a batch.
        prefix: tokens before the text of a sample with an image.
        first_special_id: text ids are below.
    """
    generator = np.random.default_rng(seed)
    logs = generator.normal(math.log(distribution.median), distribution.sigma, (candidates, count))
    lengths = np.exp(logs).round().astype(int)
    lengths = lengths.clip(distribution.shortest, distribution.longest)
    images = generator.random((candidates, count)) >= distribution.text_only
    rows = lengths + prefix * images
    padding = [padding_share(row) for row in rows.tolist()]
    chosen = padding.index(statistics.median_low(padding))
    return [
        Sample(torch.from_numpy(generator.integers(FIRST_TEXT_ID, first_special_id, length)), image)
        for length, image in zip(lengths[chosen].tolist(), images[chosen].tolist(), strict=True)
    ]


def padding_share(lengths: Sequence[int]) -> float:
    """The share of padding in a batch whose rows are all as long as its longest."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


@dataclass(frozen=True)
class Batch:
    """Samples as a model takes them.

    Attributes:
        input_ids: int64 ``[B, S]``; image placeholders expanded.
        labels: int64 ``[B, S]``, -100 where there is none.
        real: bool ``[B, S]``, False for padding, which is on the right.
        position_ids: int64 ``[B, S]`` of a packed row, 0 where a document starts; else None.
        pixel_values: ``[images, 3, H, W]``, or None without an image.
        images, labelled, tokens: how many images, labels and tokens that aren't padding.
    """

    input_ids: Tensor
    labels: Tensor
    real: Tensor
    position_ids: Tensor | None
    pixel_values: Tensor | None
    images: int
    labelled: int
    tokens: int

    @property
    def padding(self) -> float:
        """Padding's share of the batch's tokens."""
        return 1 - self.tokens / self.input_ids.numel()


def collate(
    samples: Sequence[Sample],
    prefix: Sequence[int],
    pixel_values: Tensor | None,
    *,
    pad_id: int,
    packed: bool,
) -> Batch:
    """One row per sample, or all documents in one row, on the pixels' device (without pixels, the CPU).

    Args:
        prefix: token ids that stand for an image, before the text.
        pixel_values: of the samples with an image, in their order.
    """
    before = torch.tensor(prefix, dtype=torch.int64)
    ids, labels = [], []
    for sample in samples:
        own = torch.cat([before, sample.text]) if sample.image else sample.text
        answer = len(sample.text) - len(sample.text) // 2
        label = own.clone()
        label[: len(own) - len(sample.text) + answer] = IGNORED
        ids.append(own)
        labels.append(label)
    device = "cpu" if pixel_values is None else pixel_values.device
    lengths = [len(own) for own in ids]
    positions = None
    if packed:
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        ids, labels = [torch.cat(ids)], [torch.cat(labels)]

    def stacked(rows: list[Tensor], filling: int) -> Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)
        return padded.to(device)

    return Batch(
        input_ids=stacked(ids, pad_id),
        labels=stacked(labels, IGNORED),
        real=stacked([torch.ones(len(row), dtype=torch.bool) for row in ids], False),
        position_ids=positions,
        pixel_values=pixel_values,
        images=sum(sample.image for sample in samples),
        labelled=sum(int((row != IGNORED).sum()) for row in labels),
        tokens=sum(lengths),
    )
