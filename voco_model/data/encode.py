"""The encoder: a sample into token ids, labels and pixels, laid out as Listing 1 of the supplement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.processing_utils import ProcessorMixin

from voco_model.data.faults import DataError
from voco_model.data.pictures import Picture
from voco_model.data.samples import Sample
from voco_model.pictures import WHITE, PictureLimits
from voco_model.vlm.control_tokens import check_appends_nothing, control_tokens, token_ids
from voco_model.vlm.prompt import image_part, text_pieces

_LIMITS = PictureLimits()
IGNORE = -100  # the label that losses of PyTorch and Transformers ignore


@dataclass(frozen=True)
class Encoded:
    """A document that a model can be trained on.

    Attributes:
        input_ids: int64 ``[S]``, each image as its run of image tokens.
        labels: int64 ``[S]``, ``IGNORE`` except for answers and their end tokens.
        pixel_values: the image processor's output, images first; None without images.
        image_sizes: int64 ``[images, 2]``, height and width, for models that need them.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    image_sizes: Tensor | None = None


class Encoder:
    """Encodes samples for one processor and prompt style; can be pickled for worker processes.

    Args:
        processor: an enabled model's processor, whose tokenizer has ``<VoCo>``. It must be a fast
            tokenizer, which gives the characters of each token.
        style: a name in ``voco_model.vlm.prompt.STYLES``.
        max_length: most tokens of a document, image tokens included; the rest is cut off.
        ground: color (red, green, blue, 0 to 255) behind transparent pixels.
        limits: largest images accepted.

    Raises:
        ValueError: a slow tokenizer, or one that appends tokens of its own to every text.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        style: str,
        max_length: int,
        *,
        ground: tuple[int, int, int] = WHITE,
        limits: PictureLimits = _LIMITS,
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise ValueError(
                "expected a fast tokenizer, which gives the characters of each token, got "
                f"{type(processor.tokenizer).__name__}; load the processor with use_fast=True"
            )
        check_appends_nothing(processor.tokenizer)
        self._processor, self._style, self.max_length = processor, style, max_length
        self._control_tokens = control_tokens(processor.tokenizer)
        self._pictures = {"limits": limits, "processor": processor}
        self._ground = ground
        self._image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    def length(self, sample: Sample, num_voco: int) -> int:
        """Number of tokens of the document before it is cut; reads only the headers of images.

        Raises:
            DataError: ``over_long``, if no answer begins within ``max_length``; ``broken_image``.
        """
        ids, learnt = self._tokens(sample, num_voco)
        sizes = [picture.size(**self._pictures) for picture in sample.pictures]
        counts = self._image_tokens(sizes)
        ids, learnt = self._expand(ids, learnt, counts)
        self._check_learnt(sample, learnt)
        return len(ids)

    def encode(self, sample: Sample, num_voco: int) -> Encoded:
        """The document, with its images decoded and processed.

        Raises:
            DataError: like ``length``.
        """
        ids, learnt = self._tokens(sample, num_voco)
        pixels: dict[str, Tensor] = {}
        counts: list[int] = []
        if sample.pictures:
            pixels, counts = self._pixels(sample.pictures)
        ids, learnt = self._expand(ids, learnt, counts)
        self._check_learnt(sample, learnt)
        ids, learnt = ids[: self.max_length], learnt[: self.max_length]
        return Encoded(
            torch.from_numpy(ids), torch.from_numpy(np.where(learnt, ids, IGNORE)), **pixels
        )

    def filler(self, num_voco: int) -> Encoded:
        """A document with a black image and no labels, for a rank without an image."""
        picture = Picture(Image.new("RGB", (32, 32)), "filler")
        pixels, counts = self._pixels([picture])
        text = image_part(num_voco)
        ids = np.array(self._processor.tokenizer(text)["input_ids"], dtype=np.int64)
        ids, _ = self._expand(ids, np.zeros(len(ids), dtype=bool), counts)
        return Encoded(torch.from_numpy(ids), torch.full((len(ids),), IGNORE), **pixels)

    def _tokens(self, sample: Sample, num_voco: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids with one token per image, and a mask of those that belong to answers."""
        tokenizer = self._processor.tokenizer
        images = len(sample.pictures)
        pieces = text_pieces(
            sample.messages,
            with_image=images > 0,
            eos_token=tokenizer.eos_token or "",
            style=self._style,
            control_tokens=self._control_tokens,
        )
        written, answers = image_part(num_voco, images), []
        for text, is_learnt in pieces:
            if is_learnt:
                answers.append((len(written), len(written) + len(text)))
            written += text
        made = token_ids(tokenizer, written, return_offsets_mapping=True)
        offsets = np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, stops = offsets[:, 0], offsets[:, 1]
        learnt = np.zeros(len(offsets), dtype=bool)
        for start, stop in answers:
            learnt |= (starts < stop) & (stops > start) & (stops > starts)
        return np.array(made["input_ids"], dtype=np.int64), learnt

    def _image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        if not sizes:
            return []
        return list(self._processor._get_num_multimodal_tokens(list(sizes)).num_image_tokens)

    def _pixels(self, pictures: Sequence[Picture]) -> tuple[dict[str, Tensor], list[int]]:
        images = [picture.open(ground=self._ground, **self._pictures) for picture in pictures]
        made = self._processor.image_processor(images=images, return_tensors="pt")
        kept = {k: v for k, v in made.items() if k in ("pixel_values", "image_sizes")}
        return kept, self._image_tokens([(image.height, image.width) for image in images])

    def _expand(
        self, ids: np.ndarray, learnt: np.ndarray, counts: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self._image_id] = counts
        return np.repeat(ids, repeats), np.repeat(learnt, repeats)

    def _check_learnt(self, sample: Sample, learnt: np.ndarray) -> None:
        # The first token is never predicted.
        if not learnt[1 : self.max_length].any():
            raise DataError(
                "over_long",
                sample.where,
                f"expected an answer within {self.max_length} tokens, got none of {len(learnt)}",
            )
