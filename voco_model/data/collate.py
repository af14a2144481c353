"""The collator: documents into one packed row, or into rows padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from voco_kernels import MaskLayout
from voco_model.data.encode import IGNORE, Encoded
from voco_model.data.faults import Fault

STATS = "voco_stats"


@dataclass
class BatchStats:
    """Counts for a micro-batch, passed along with it and removed before the model sees it.

    Attributes:
        samples: number of documents, without fillers.
        tokens: number of their tokens.
        computed: number of tokens with padding and fillers.
        pairs: number of visible (query, key) pairs, for one head.
        tiles: number of images that the vision tower reads.
        faults: samples that were skipped.
    """

    samples: int = 0
    tokens: int = 0
    computed: int = 0
    pairs: int = 0
    tiles: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: BatchStats) -> None:
        self.samples += other.samples
        self.tokens += other.tokens
        self.computed += other.computed
        self.pairs += other.pairs
        self.tiles += other.tiles
        self.faults += other.faults


@dataclass
class Collator:
    """Puts documents into a batch for an enabled model.

    Attributes:
        packed: make one row ``[1, S]`` with ``position_ids`` that restart with each document, so that
            no document sees another; else rows ``[B, S]`` with ``attention_mask``.
        filler: a document without labels, added to a batch without documents and, if ``always_image``,
            to one without images: with sharded weights, every rank must run the same modules, or all
            wait forever.
        voco_token_id, image_token_id, isolated: as the model has them, to count the visible pairs.
    """

    packed: bool
    pad_token_id: int
    filler: Encoded
    always_image: bool
    voco_token_id: int
    image_token_id: int
    isolated: bool = False

    def __call__(self, documents: Sequence[Encoded | Fault]) -> dict:
        """Make a batch; faults among the documents go into its statistics.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask`` or ``position_ids``, ``pixel_values`` and
            ``image_sizes`` where there are images, and ``voco_stats``, a ``BatchStats``.
        """
        faults = [document for document in documents if isinstance(document, Fault)]
        rows = [document for document in documents if isinstance(document, Encoded)]
        stats = BatchStats(len(rows), sum(len(row.input_ids) for row in rows), faults=faults)
        has_image = any(row.pixel_values is not None for row in rows)
        if not rows or (self.always_image and not has_image):
            rows.append(self.filler)
        batch = self._packed(rows) if self.packed else self._padded(rows)
        batch |= self._images(rows)
        stats.computed = batch["input_ids"].numel()
        stats.tiles = sum(_tiles(row) for row in rows)
        stats.pairs = MaskLayout.from_input_ids(
            batch["input_ids"],
            voco_token_id=self.voco_token_id,
            image_token_id=self.image_token_id,
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            isolated=self.isolated,
        ).pairs()
        return {**batch, STATS: stats}

    def _packed(self, rows: list[Encoded]) -> dict[str, Tensor]:
        positions = [torch.arange(len(row.input_ids)) for row in rows]
        labels = [row.labels.clone() for row in rows]
        for document in labels:
            document[0] = IGNORE  # the previous document would predict it
        return {
            "input_ids": torch.cat([row.input_ids for row in rows])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat(positions)[None],
        }

    def _padded(self, rows: list[Encoded]) -> dict[str, Tensor]:
        def padded(tensors: list[Tensor], value: int) -> Tensor:
            return pad_sequence(tensors, batch_first=True, padding_value=value)

        return {
            "input_ids": padded([row.input_ids for row in rows], self.pad_token_id),
            "labels": padded([row.labels for row in rows], IGNORE),
            "attention_mask": padded([torch.ones_like(row.input_ids) for row in rows], 0),
        }

    def _images(self, rows: list[Encoded]) -> dict[str, Tensor]:
        pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
        if not pixels:
            return {}
        if (
            pixels[0].dim() == 5
        ):  # [images, tiles, 3, H, W]: the number of tiles differs between images
            most = max(part.shape[1] for part in pixels)
            pixels = [
                torch.cat(
                    [part, part.new_zeros(len(part), most - part.shape[1], *part.shape[2:])], 1
                )
                for part in pixels
            ]
        images = {"pixel_values": torch.cat(pixels)}
        sizes = [row.image_sizes for row in rows if row.image_sizes is not None]
        return images | ({"image_sizes": torch.cat(sizes)} if sizes else {})


def _tiles(row: Encoded) -> int:
    pixels = row.pixel_values
    return 0 if pixels is None else pixels.shape[0] * (pixels.shape[1] if pixels.dim() == 5 else 1)
