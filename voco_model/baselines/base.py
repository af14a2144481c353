"""``Method``: the interface of all ways to represent an image in the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.processing_utils import ProcessorMixin

from voco_model.arguments import whole_number
from voco_model.baselines.cost import Cost, token_bytes
from voco_model.flops import decoder_layer, head
from voco_model.pictures import as_images, decode_each, ground_of
from voco_model.vlm.attach import IN_USE, SUPPORTED, is_enabled
from voco_model.vlm.control_tokens import control_tokens, prepare_tokenizer
from voco_model.vlm.devices import execution_device
from voco_model.vlm.processor_check import checked_tokenizer
from voco_model.vlm.prompt import (
    IMAGE_TOKEN,
    Turns,
    image_part,
    images_in,
    pictures_in,
    style_in,
    style_of,
    text_part,
)
from voco_model.vlm.undo import put


class Method(ABC):
    """A model that answers from ``num_tokens`` tokens per image; a context manager undoes it.

    Args:
        model: a LLaVA that is not enabled and has no other method applied.
        processor: its processor.
        num_tokens: tokens per image; the default depends on the method.
        style: the prompt style, a name in ``voco_model.vlm.prompt.STYLES``; by default what the model's
            config says, else ``"vicuna"``.

    Attributes:
        name, label: the method's name in options, and in tables.
        source: where the method comes from.
        trained: whether it has weights to train.
        model, processor: the same objects, changed until ``undo``.
        num_tokens: tokens per image; None if that depends on the image (``full`` of LLaVA-NeXT).

    Raises:
        TypeError: another model class or processor.
        ValueError: a model in use, or an argument out of range. Nothing is changed then.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    trained: ClassVar[bool]

    def __init__(
        self,
        model,
        processor: ProcessorMixin,
        num_tokens: int | None = None,
        *,
        style: str | None = None,
    ) -> None:
        _check_free(model)
        checked_tokenizer(model, processor)
        _check_projector(model, self.name)
        if num_tokens is not None:
            num_tokens = whole_number("num_tokens", num_tokens, at_least=1)
        if style is not None:
            style_of(style)
        self.model = model
        self.processor = processor
        self._num_voco = 0  # written after each image of a prompt
        with ExitStack() as steps:  # an error undoes what was done
            if style is not None:
                put(steps, model.config, "voco_prompt", style)
            self.num_tokens = self._install(steps, num_tokens)
            prepare_tokenizer(processor.tokenizer, steps)
            steps.callback(IN_USE.discard, model)
            IN_USE.add(model)  # only now: some methods call attach, which refuses a model in use
            self._steps = steps.pop_all()

    @abstractmethod
    def _install(self, steps: ExitStack, num_tokens: int | None) -> int | None:
        """Change model and processor, with callbacks on ``steps`` to undo it; return ``num_tokens``."""

    @abstractmethod
    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        """The cost of an image and a question in the language model.

        Args:
            text_tokens: tokens of the question, with BOS and the newline after the image.
            dtype: dtype of the keys and values; by default the model's.

        Raises:
            ValueError: LLaVA-NeXT, where the cost depends on the image.
        """

    def undo(self) -> None:
        """Restore model and processor. Weights keep their current values. A second call does nothing."""
        self._steps.close()

    def __enter__(self) -> Method:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, num_tokens={self.num_tokens})"

    def prompt(self, turns: Turns, *, add_generation_prompt: bool = True) -> str:
        """The prompt of ``voco_model.prompt``, with this method's VoCo tokens, if it has any.

        Args:
            turns: a question about one image, or messages with one image per image part.
        """
        images = images_in(turns)
        if self._num_voco:
            image = image_part(self._num_voco, images)
        else:
            image = "\n".join([IMAGE_TOKEN] * images)
        return image + text_part(
            turns,
            with_image=images > 0,
            add_generation_prompt=add_generation_prompt,
            eos_token=self.processor.tokenizer.eos_token or "",
            style=style_in(self.model.config),
            control_tokens=control_tokens(self.processor.tokenizer),
        )

    def inputs(self, images: Sequence[Any] | None, turns: Sequence[Turns]) -> dict[str, Tensor]:
        """The model's inputs, on its device: ``input_ids`` and ``attention_mask``, int64 ``[B, S]``,
        padded on the left, and pixels in the model's dtype.

        Args:
            images: the images of the first row, then of the second, ..., each in any form that
                ``voco_model.pictures.decode`` accepts; None for those in the messages.
            turns: a question or messages per row.

        Raises:
            PictureError: not an image, or an unreadable one.
            ValueError: another number of images than the prompts have.
        """
        images = check_images(images, turns)
        ground = ground_of(self.model.config)
        images = list(decode_each(images, ground=ground, processor=self.processor))
        made = self.processor(
            images=images or None,
            text=[self.prompt(turn) for turn in turns],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        device = execution_device(self.model.get_input_embeddings())
        return {
            name: value.to(device, self.model.dtype if name == "pixel_values" else None)
            for name, value in made.items()
        }

    def generate(
        self, images: Sequence[Any] | None, turns: Sequence[Turns], **generate_kwargs
    ) -> Tensor:
        """The model's own ``generate``.

        Args:
            images, turns: as for ``inputs``.
            generate_kwargs: as for ``model.generate``.

        Returns:
            int64 ``[B, new]``, the new tokens only, padded after their end.

        Raises:
            ValueError: a model in training mode, or an option with which the method can't be exact.
        """
        self._check_generate(generate_kwargs)
        inputs = self.inputs(images, turns)
        return self.model.generate(**inputs, **generate_kwargs)[:, inputs["input_ids"].shape[1] :]

    def answer(
        self, images: Sequence[Any] | None, turns: Sequence[Turns], **generate_kwargs
    ) -> list[str]:
        """``generate``, decoded, without special tokens and surrounding white space."""
        tokens = self.generate(images, turns, **generate_kwargs)
        decoded = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def _check_generate(self, generate_kwargs: Mapping) -> None:
        if self.model.training:
            raise ValueError(
                "expected a model in eval mode, got one in training; call model.eval()"
            )
        if generate_kwargs.get("return_dict_in_generate"):
            raise ValueError(
                "expected no return_dict_in_generate, got True; methods return tokens: call "
                "method.model.generate(**method.inputs(...))"
            )

    def _vision_tokens(self) -> int:
        """Vision tokens of an image, as the processor writes them."""
        if not isinstance(self.model, LlavaForConditionalGeneration):
            raise ValueError(
                "expected LLaVA-1.5, whose images all have the same number of vision tokens, got "
                f"{type(self.model).__name__}, where the number depends on the image's size"
            )
        return tokens_written(self.processor)

    def _uniform_cost(
        self, image: int, kept: int, text_tokens: int, dtype: torch.dtype | None
    ) -> Cost:
        """The cost if all layers read ``image`` tokens, and cache the ``kept`` ones that text sees."""
        text_tokens = whole_number("text_tokens", text_tokens, at_least=1)
        text = self.model.config.text_config
        layers = text.num_hidden_layers
        again = layers * decoder_layer(text, text_tokens, kept).useful
        again += head(self.model.config).useful
        return Cost(
            tokens=kept,
            cache_bytes=layers * kept * token_bytes(text, dtype or self.model.dtype),
            flops_first=layers * decoder_layer(text, image).useful + again,
            flops_again=again,
        )


class Projector(nn.Module):
    """A replacement of LLaVA's projector: features ``[images, patches, width]`` of the vision tower ->
    ``[images, num_tokens, hidden]`` for the language model."""


def check_images(images: Sequence[Any] | None, turns: Sequence[Turns]) -> list:
    """The images as a list; without ``images``, those in the messages' image parts.

    Raises:
        ValueError: another number of images than the prompts have.
    """
    if isinstance(turns, str) or not len(turns):
        raise ValueError(f"expected a list of questions or conversations, got {turns!r}")
    if images is None:
        images = [picture for turn in turns for picture in pictures_in(turn)]
    else:
        images = list(as_images(images))
    needed = sum(map(images_in, turns))
    if len(images) != needed:
        raise ValueError(
            f"expected {needed} images for {len(turns)} prompts, got {len(images)}; a plain question "
            "needs one, messages need one per part {'type': 'image'}"
        )
    return images


def tokens_written(processor: ProcessorMixin) -> int:
    """Image tokens that a ``LlavaProcessor`` writes per image."""
    return processor._get_num_multimodal_tokens([(1, 1)]).num_image_tokens[0]


def _check_free(model) -> None:
    if not isinstance(model, SUPPORTED):
        names = " or ".join(cls.__name__ for cls in SUPPORTED)
        raise TypeError(
            f"expected a {names}, got {type(model).__name__}; apply a method to the model itself, "
            "before it is wrapped (PEFT, DDP, torch.compile)"
        )
    if model in IN_USE or is_enabled(model):
        raise ValueError(
            "expected a model as it was loaded, got one that is enabled or has a method applied; call "
            "undo() on what enable or apply returned first"
        )


def _check_projector(model, name: str) -> None:
    made_for = (getattr(model.config, "voco_baseline", None) or {}).get("name")
    if made_for in (None, "full"):
        return
    if made_for != name or not isinstance(model.model.multi_modal_projector, Projector):
        raise ValueError(
            f"expected a LLaVA with a projector for {name!r}, got one made for {made_for!r}; "
            f"load it with voco_model.baselines.load(path), which builds {made_for!r} again"
        )
