"""``FirstPass``: reads batches of images, and extracts their compact entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import extract
from voco_model.engine.clock import StageClock
from voco_model.engine.language import Language
from voco_model.engine.plan import ImageSlot
from voco_model.engine.programs import Programs, bucket
from voco_model.engine.row_cache import RowCache, Step
from voco_model.pictures import decode
from voco_model.vlm.rope import rope_of

# At most so many tiles go through the vision tower together.
_MAX_TILES = 16
# LLaVA-NeXT's images take varying numbers of tokens. Their prefixes are padded on the right to multiples
# of this.
_GRAIN = 128


@dataclass(frozen=True)
class Pixels:
    """An image as input of the vision tower.

    Attributes:
        tiles: ``[tiles, 3, H, W]``, on the CPU.
        size: (height, width) of the picture if it was cut into tiles; otherwise None.
    """

    tiles: Tensor
    size: tuple[int, int] | None


def prepare_pixels(processor, image: Any, **options) -> Pixels:
    """Runs the model's image processor on one image.

    Args:
        image, options: as for ``voco_model.pictures.decode``.
    """
    picture = decode(image, processor=processor, **options)
    made = processor.image_processor(images=[picture], return_tensors="pt")
    tiles = made["pixel_values"]
    if "image_sizes" not in made:
        return Pixels(tiles, None)
    height, width = made["image_sizes"][0].tolist()
    return Pixels(tiles[0], (height, width))


class FirstPass:
    """Pass 1: vision tower and language model over batches of images.

    Args:
        language: the language model.
        num_kept: number of tokens that an entry keeps, from the end of an image's segment; None for all.
        max_images: images in one forward pass.
        max_tail: upper limit on the token ids around an image in its segment.
        programs, clock: the engine's.
        fingerprint: of the model, for the entries.
    """

    def __init__(
        self,
        language: Language,
        *,
        num_kept: int | None,
        max_images: int,
        max_tail: int,
        programs: Programs,
        clock: StageClock,
        fingerprint: str,
    ) -> None:
        self._language = language
        self._base = language.model.model
        self._config = language.model.config
        self._num_kept = num_kept
        self.max_images = max_images
        self._tiled = hasattr(self._config, "image_grid_pinpoints")
        self._slots = max_image_tokens(self._config) + max_tail
        self._programs = programs
        self._clock = clock
        self._fingerprint = fingerprint
        self._rope = rope_of(self._base.language_model)
        self._cache: RowCache | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def cache_bytes(self) -> int:
        """Size of the cache, which is allocated for the first image."""
        return 0 if self._cache is None else self._cache.nbytes

    def features(self, images: Sequence[Pixels]) -> list[Tensor]:
        """Embeddings ``[tokens, H]`` of each image: vision tower, projector, tiles joined."""
        with self._clock("vision"):
            tiles = torch.cat([image.tiles for image in images])
            chunks = [self._embed_tiles(chunk) for chunk in tiles.split(_MAX_TILES)]
            embedded = torch.cat(chunks)
            by_image = embedded.split([image.tiles.shape[0] for image in images])
            if not self._tiled:
                return [tiles[0] for tiles in by_image]
            packed, _ = self._base.pack_image_features(
                by_image,
                torch.tensor([image.size for image in images]),
                vision_feature_select_strategy=self._config.vision_feature_select_strategy,
                image_newline=self._base.image_newline,
            )
            return list(packed)

    def entries(self, features: Sequence[Tensor], slots: Sequence[ImageSlot]) -> list[CompactKV]:
        """The compact entry of each image, from its embeddings and the token ids around it.

        Raises:
            torch.OutOfMemoryError: for the activations, or for the cache, which is allocated here.
        """
        if self._cache is None:
            self._cache = self._language.new_cache(self.max_images, self._slots)
        with self._clock("prefix"):
            lengths = [
                len(slot.before) + feature.shape[0] + len(slot.behind)
                for feature, slot in zip(features, slots, strict=True)
            ]
            rows, width = min(bucket(len(lengths)), self.max_images), max(lengths)
            if self._tiled:
                width = min(-(-width // _GRAIN) * _GRAIN, self._slots)
            embeds = self._front("prefix", (rows, width, self._language.hidden_size))
            embeds.zero_()  # an earlier image may have left NaN
            for row, (feature, slot) in enumerate(zip(features, slots, strict=True)):
                embeds[row, : lengths[row]] = self.join([slot.before, feature, slot.behind])
            self._programs.run(("prefix", rows, width), lambda: self._read_prefix(embeds))
        with self._clock("extract"):
            kept = [
                range(0 if self._num_kept is None else length - self._num_kept, length)
                for length in lengths
            ]
            return extract(
                self._cache.views,
                kept,
                kept,
                next_positions=lengths,
                rope=self._rope,
                fingerprint=self._fingerprint,
            )

    def join(self, pieces: Sequence[Sequence[int] | Tensor]) -> Tensor:
        """Embeddings ``[T, H]``, concatenated from token ids and from embeddings ``[n, H]``."""
        language = self._language
        return torch.cat(
            [
                piece
                if isinstance(piece, Tensor)
                else language.embedding(
                    torch.tensor(list(piece), dtype=torch.int64).to(language.device)
                )
                for piece in pieces
            ]
        )

    def _embed_tiles(self, tiles: Tensor) -> Tensor:
        count = bucket(tiles.shape[0])
        pixels = self._front("pixels", (count, *tiles.shape[1:]))
        pixels[: tiles.shape[0]] = tiles.to(pixels.dtype).to(pixels.device, non_blocking=True)
        embedded = self._programs.run(("vision", count), lambda: self._see(pixels))
        # The next run of a program may overwrite this one's output.
        return embedded[: tiles.shape[0]].clone()

    def _see(self, pixels: Tensor) -> Tensor:
        layers = self._config.vision_feature_layer
        states = self._base.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self._config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]  # without the class token
        return self._base.multi_modal_projector(torch.cat(chosen, dim=-1))

    def _read_prefix(self, embeds: Tensor) -> None:
        rows, width, _ = embeds.shape
        device = embeds.device
        positions = torch.arange(width, device=device).expand(rows, width)
        step = Step(torch.arange(rows, device=device), positions, span=None)
        self._language.forward(self._cache, step, embeds, positions)

    def _front(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape at the start of a buffer shared by all shapes: CUDA graphs need a fixed
        address."""
        if name not in self._buffers:
            most = self.max_images * self._slots if name == "prefix" else _MAX_TILES
            each = shape[1:] if name == "pixels" else shape[2:]
            self._buffers[name] = torch.zeros(
                most * prod(each), dtype=self._language.dtype, device=self._language.device
            )
        return self._buffers[name][: prod(shape)].view(shape)


def max_image_tokens(config) -> int:
    """The largest number of embeddings that an image can take."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    whole = side * side + (config.vision_feature_select_strategy == "full")
    if not hasattr(config, "image_grid_pinpoints"):
        return whole
    grids = [
        get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, vision.image_size)
        for size in config.image_grid_pinpoints
    ]
    # Each row of patches ends in a newline.
    return whole + max(high * side * (wide * side + 1) for high, wide in grids)
