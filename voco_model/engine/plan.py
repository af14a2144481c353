"""``plan_prompt``: splits a prompt into segments for pass 1 and text for pass 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voco_model.arguments import is_whole
from voco_model.vlm.control_tokens import control_tokens, token_ids
from voco_model.vlm.prompt import (
    IMAGE_TOKEN,
    VOCO_TOKEN,
    Turns,
    image_part,
    images_in,
    style_in,
    text_part,
)


@dataclass(frozen=True)
class ImageSlot:
    """Token ids around an image in a prompt. Pass 1 reads an image with its segment: ``before``, the
    image tokens and ``behind``.

    Attributes:
        before: ids before the image tokens (BOS, for the first image).
        behind: ids after them (newline and VoCo tokens).
        joint: ids of text between the previous segment and this one.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    joint: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A prompt: the segments of its images, followed by text.

    Attributes:
        images: one for each segment, in order.
        text: ids after the last segment.
    """

    images: tuple[ImageSlot, ...]
    text: tuple[int, ...]

    @property
    def num_text(self) -> int:
        """Number of tokens that pass 2 has to read: text, including that between segments."""
        return len(self.text) + sum(len(image.joint) for image in self.images)


def plan_prompt(
    text: Turns | Sequence[int], images: int, *, processor, model, num_voco: int | None
) -> Plan:
    """Builds the prompt of the paper's supplement, Listing 1, and splits it.

    Args:
        text: a question, messages, or the token ids that follow the last image's segment.
        images: number of images before the text.
        processor, model: that ``enable`` was called with.
        num_voco: VoCo tokens after each image; None for a plain LLaVA's prompt, without any.

    Raises:
        TypeError: text of another type.
        ValueError: messages with another number of images, or token ids that stand for images.
    """
    tokenizer, config = processor.tokenizer, model.config
    if not isinstance(text, Sequence) or isinstance(text, bytes):
        raise TypeError(
            "expected a question, messages or a list of token ids, got "
            f"{type(text).__name__}; convert a tensor of token ids by ids.tolist()"
        )
    as_ids = not isinstance(text, str) and len(text) > 0 and not isinstance(text[0], Mapping)
    if as_ids:
        written = ""
        for name in ("image_token_id", "voco_token_id"):
            if getattr(config, name) in text:
                raise ValueError(
                    f"expected ids of the text after the images only, got {name} "
                    f"{getattr(config, name)} at {list(text).index(getattr(config, name))}; pass the "
                    "images in images"
                )
        rows = model.get_input_embeddings().num_embeddings
        invalid = [token for token in text if not is_whole(token) or not 0 <= token < rows]
        if invalid:
            raise ValueError(f"expected token ids from 0 to {rows - 1}, got {invalid[0]!r}")
    else:
        mentioned = images_in(text, question=0)
        if mentioned not in (0, images):
            raise ValueError(
                f"expected as many images as image parts in the messages, got {images} images and "
                f"{mentioned} parts; pass the same number of both"
            )
        written = text_part(
            text,
            with_image=images > 0,
            eos_token=tokenizer.eos_token or "",
            style=style_in(config),
            control_tokens=control_tokens(tokenizer),
        )
    front = "\n".join([IMAGE_TOKEN] * images) if num_voco is None else image_part(num_voco, images)
    ids = list(token_ids(tokenizer, front + written)["input_ids"])
    if as_ids:
        ids += [int(token) for token in text]
    return _cut(ids, images, config, voco=num_voco is not None)


def _cut(ids: list[int], images: int, config, *, voco: bool) -> Plan:
    if images == 0:
        return Plan((), tuple(ids))
    places = [index for index, token in enumerate(ids) if token == config.image_token_id]
    if len(places) != images:
        raise ValueError(
            f"expected a tokenizer that knows {IMAGE_TOKEN} as {config.image_token_id}, got "
            f"{len(places)} of it for {images} images; pass the processor that was given to enable"
        )
    # A segment ends with its VoCo tokens, or with the image in a plain prompt.
    stops = []
    for start, stop in zip(places, [*places[1:], len(ids)], strict=True):
        inside = [index for index in range(start, stop) if ids[index] == config.voco_token_id]
        if voco and not inside:
            raise ValueError(
                f"expected a tokenizer that knows {VOCO_TOKEN} as {config.voco_token_id}, got none of "
                "it; pass the processor that was given to enable"
            )
        stops.append(inside[-1] + 1 if voco else start + 1)
    cut, reached = [], 0
    for index, (place, stop) in enumerate(zip(places, stops, strict=True)):
        between = tuple(ids[reached:place])
        before, joint = (between, ()) if index == 0 else ((), between)
        cut.append(ImageSlot(before, tuple(ids[place + 1 : stop]), joint))
        reached = stop
    return Plan(tuple(cut), tuple(ids[reached:]))
