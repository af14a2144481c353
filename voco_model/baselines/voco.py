"""``VoCo``, and ``Untrained``, the same mask on a model that wasn't trained with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from voco_model.baselines.base import Method, check_images
from voco_model.baselines.cost import Cost
from voco_model.vlm.attach import attach
from voco_model.vlm.compress import compress
from voco_model.vlm.generate import generate
from voco_model.vlm.prompt import Turns, images_in


class VoCo(Method):
    """VoCo tokens in an enabled model, with answers in two passes.

    Source: VoCo-LLaMA (Ye et al. 2024, arXiv 2406.12275, sections 3.1 and 3.2).

    Args:
        num_tokens: VoCo tokens per image; by default what the model's config says, else 1.
        distinct, isolated: as for ``enable``; by default what the model's config says.
    """

    name = "voco"
    label = "VoCo-LLaMA"
    source = "arXiv 2406.12275, sections 3.1 and 3.2"
    trained = True

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        distinct: bool | None = None,
        isolated: bool | None = None,
        style: str | None = None,
    ) -> None:
        self._options = {"distinct": distinct, "isolated": isolated}
        super().__init__(model, processor, num_tokens, style=style)

    def _install(self, steps: ExitStack, num_tokens: int | None) -> int:
        handle = steps.enter_context(
            attach(self.model, self.processor, num_tokens, **self._options)
        )
        self._num_voco = handle.num_voco
        return handle.num_voco

    def generate(
        self, images: Sequence[Any] | None, turns: Sequence[Turns], **generate_kwargs
    ) -> Tensor:
        """Two passes if each row has one image; else one masked pass, which computes the same.

        Args, returns, raises: as ``Method.generate``, and as ``voco_model.generate``.
        """
        if any(images_in(turn) != 1 for turn in turns):
            return super().generate(images, turns, **generate_kwargs)
        self._check_generate(generate_kwargs)
        images = check_images(images, turns)
        entries = compress(self.model, images, processor=self.processor)
        return generate(
            self.model, entries, list(turns), processor=self.processor, **generate_kwargs
        )

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        image = self._vision_tokens() + self.num_tokens
        return self._uniform_cost(image, self.num_tokens, text_tokens, dtype)


class Untrained(VoCo):
    """The lower bound: VoCo's mask at inference only.

    Source: VoCo-LLaMA (arXiv 2406.12275, section 4.2), which uses the model of the upper bound, trained
    with VoCo tokens and an unmodified mask (``"full"`` with ``num_voco``). In a plain LLaVA, the
    embedding row of ``<VoCo>`` is untrained as well.
    """

    name = "untrained"
    label = "VoCo mask, untrained"
    source = "lower bound of arXiv 2406.12275, section 4.2"
    trained = False
