"""``compress``: pass 1, an image's keys and values at its VoCo tokens (section 2.3 of the supplement).

Pass 1 reads an image once and keeps the keys and values of its VoCo tokens. Pass 2 (``generate``)
answers any number of questions from these. Together they compute what one masked pass over the whole
sequence computes: under the mask, these keys and values are all that text sees of the image, and the
text keeps its position ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from voco_kernels.kv.entry import CompactKV
from voco_model.arguments import whole_number
from voco_model.kv_store.base import Store
from voco_model.pictures import PictureLimits, decode_each, ground_of
from voco_model.vlm.attach import check_ready
from voco_model.vlm.caches import CACHE_ARGUMENT, VoCoCollector
from voco_model.vlm.devices import execution_device
from voco_model.vlm.fingerprint import fingerprint
from voco_model.vlm.image_key import image_key
from voco_model.vlm.prompt import image_part
from voco_model.vlm.rope import check_length, rope_of
from voco_model.vlm.warn import warn_once

logger = logging.getLogger(__name__)

_LIMITS = PictureLimits()
# Batches of decoded images that are looked up in a store together.
_BATCHES_AT_ONCE = 4


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    images: Any = None,
    *,
    processor: ProcessorMixin | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    num_voco: int | None = None,
    batch_size: int = 8,
    store: Store | None = None,
    salt: str | bytes | None = None,
    ground: tuple[int, int, int] | None = None,
    limits: PictureLimits = _LIMITS,
) -> list[CompactKV]:
    """Pass 1: one entry per image, in order. The language model's head doesn't run.

    Args:
        model: enabled, in eval mode.
        images: an image or an iterable of images, each in any form that ``voco_model.pictures.decode``
            accepts. A four-dimensional array is a sequence of images. An iterator is consumed batch by
            batch.
        processor: the one given to ``enable``; required with ``images``.
        inputs: in place of ``images``, a processor's output for prompts with one image per row:
            ``input_ids`` ``[B, S]``, ``pixel_values`` with B rows, ``attention_mask`` ``[B, S]`` if rows
            are padded (on either side), ``image_sizes`` for LLaVA-NeXT. Tokens after the VoCo tokens are
            not read.
        num_voco: VoCo tokens per image; by default the number given to ``enable``. Not accepted with
            ``inputs``, which already contain their VoCo tokens.
        batch_size: images per forward pass.
        store: with ``images``, a ``KVStore`` or another store. Entries it holds are returned as they
            are; new entries are put under their ``image_key``. Equal images are compressed once. If the
            store can't keep an entry, that is logged and the entry returned.
        salt: a tenant's secret for ``image_key``.
        ground: red, green and blue, 0 to 255, shown through transparent pixels; by default the color
            that the model was trained with, else white.
        limits: how large an image may be.

    Raises:
        PictureError: not an image, an unreadable one, or one over the limits.
        ValueError: a model that isn't enabled or is in training mode; a row without VoCo tokens or with
            several images; an image too long for a rotation that depends on the length.

    Warns:
        VoCoWarning: once per model, for another ``num_voco`` than its config's.
    """
    check_ready(model)
    if (images is None) == (inputs is None):
        raise ValueError("expected either images or inputs, got both or neither")
    batch_size = whole_number("batch_size", batch_size, at_least=1)
    if num_voco is not None:
        num_voco = whole_number("num_voco", num_voco, at_least=1)
    if store is None and salt is not None:
        raise ValueError("expected a salt only with a store, got one without")
    if inputs is not None:
        if store is not None:
            raise ValueError(
                "expected images with a store, whose keys are made from their pixels, got inputs"
            )
        if num_voco is not None:
            raise ValueError(
                f"expected num_voco with images only, got num_voco {num_voco} with inputs, which "
                "already contain their VoCo tokens"
            )
        return _entries(model, _split_rows(inputs, batch_size))
    if processor is None:
        raise ValueError("expected a processor to prepare the images, got none")
    own = model.config.num_voco
    if num_voco not in (None, own):
        warn_once(
            model,
            f"images are compressed to num_voco={num_voco} tokens by a model with {own} in its config; "
            "its answers may be poor unless training drew several numbers",
        )
    text = image_part(own if num_voco is None else num_voco)
    ground = ground_of(model.config, ground)
    pictures = decode_each(images, ground=ground, limits=limits, processor=processor)

    def read(batch: Iterable[Image.Image]) -> list[CompactKV]:
        return _entries(model, _prepare(processor, iter(batch), text, batch_size))

    if store is None:
        return read(pictures)
    options = {"processor": processor, "num_voco": num_voco, "limits": limits}
    known = fingerprint(model)
    key_of = partial(image_key, model=model, salt=salt, fingerprint=known, **options)
    entries: list[CompactKV] = []
    # Each image is decoded once, for its key and for the processor; a few batches fit in memory.
    while some := list(islice(pictures, _BATCHES_AT_ONCE * batch_size)):
        entries += _compress_stored(some, read, key_of, known, store)
    return entries


def _compress_stored(
    pictures: Sequence[Image.Image],
    read: Callable[[list[Image.Image]], list[CompactKV]],
    key_of: Callable[[Image.Image], str],
    fingerprint: str,
    store: Store,
) -> list[CompactKV]:
    """Entries from the store, and ``read`` once for each picture that it doesn't have."""
    keys = [key_of(picture) for picture in pictures]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    answers = zip(first, store.get_many(list(first)), strict=True)
    found = {key: entry for key, entry in answers if entry is not None}
    missing = [key for key in first if key not in found]
    made = read([pictures[first[key]] for key in missing]) if missing else []
    for key, entry in zip(missing, made, strict=True):
        found[key] = replace(entry, key=key, fingerprint=fingerprint)
        try:
            store.put(found[key])
        # A ValueError means too large an entry, or a store for another model.
        except (OSError, ValueError) as error:
            logger.warning("the entry of image %s could not be stored: %s", key, error)
    return [found[key] for key in keys]


def _split_rows(inputs: Mapping[str, Tensor], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The inputs in batches."""
    expected = {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    if not {"input_ids", "pixel_values"} <= set(inputs) <= expected:
        raise ValueError(
            "expected inputs with input_ids and pixel_values, and optionally attention_mask and "
            f"image_sizes, got {sorted(inputs)}"
        )
    rows = {name: value.shape[0] for name, value in inputs.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"expected one image per row, got rows {rows}; compress each image by itself"
        )
    for start in range(0, rows["input_ids"], batch_size):
        yield {name: value[start : start + batch_size] for name, value in inputs.items()}


def _prepare(
    processor: ProcessorMixin, pictures: Iterator[Image.Image], text: str, batch_size: int
) -> Iterator[Mapping[str, Tensor]]:
    while batch := list(islice(pictures, batch_size)):
        yield processor(images=batch, text=[text] * len(batch), padding=True, return_tensors="pt")


def _entries(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[CompactKV]:
    return [entry for batch in batches for entry in _first_pass(model, batch)]


def _first_pass(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[CompactKV]:
    device = execution_device(model.get_input_embeddings())
    input_ids = batch["input_ids"].to(device)
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        real = batch["attention_mask"].to(device) != 0
    starts, stops = _voco_runs(input_ids, real, model.config)
    # Tokens after the VoCo tokens are masked within a row, and cut off beyond the longest one.
    column = torch.arange(input_ids.shape[1], device=device)
    width = int(stops.max())
    real = (real & (column < stops[:, None]))[:, :width]
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    check_length(model.model.language_model, int(position_ids.max()) + 1, "a first pass")
    counts = (stops - starts).tolist()
    columns = (starts[:, None] + column[: max(counts)]).clamp(max=width - 1)
    cache = VoCoCollector(columns)
    vision = {
        name: batch[name].to(device, model.dtype if name == "pixel_values" else None)
        for name in ("pixel_values", "image_sizes")
        if name in batch
    }
    model.model(
        input_ids=input_ids[:, :width],
        attention_mask=real.long(),
        position_ids=position_ids,
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
        **vision,
    )
    kv = cache.kept()
    positions = position_ids.gather(1, columns).cpu()
    rope = rope_of(model.model.language_model)
    entries = []
    for row, count in enumerate(counts):
        kept = positions[row, :count].clone()
        own = kv[:, :, row, :, :count].clone(memory_format=torch.contiguous_format)
        entries.append(CompactKV(own, kept, int(kept[-1]) + 1, rope=rope))
    return entries


def _voco_runs(input_ids: Tensor, real: Tensor, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """Start and stop of each row's only run of VoCo tokens, int64 ``[B]``."""
    is_voco = real & (input_ids == config.voco_token_id)
    count = is_voco.sum(1)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = is_voco.long().argmax(1)
    stops = starts + count
    together = ((column >= starts[:, None]) & (column < stops[:, None])) == is_voco
    is_image = real & (input_ids == config.image_token_id)
    after = (is_image & (column >= stops[:, None])).sum(1)
    before = (is_image & (column < starts[:, None])).sum(1)
    for row in range(input_ids.shape[0]):
        if not count[row]:
            raise ValueError(
                f"expected VoCo tokens (id {config.voco_token_id}) in each row, got none in row "
                f"{row}; build the prompt with voco_model.prompt or the processor's chat template"
            )
        if not before[row] or after[row] or not together[row].all():
            raise ValueError(
                "expected one image followed by one run of VoCo tokens in each row, got in row "
                f"{row} {int(before[row])} image tokens before and {int(after[row])} after "
                f"{int(count[row])} VoCo tokens, {'' if together[row].all() else 'not '}in one "
                "run; two passes don't support several images per row: compress each by itself"
            )
    return starts, stops
