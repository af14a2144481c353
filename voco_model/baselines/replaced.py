"""Methods that put something in the projector's place, which gives fewer tokens an image."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from voco_model.baselines.base import Method, Projector, tokens_written
from voco_model.baselines.cost import Cost
from voco_model.vlm.undo import put


class Replaced(Method):
    """The module between vision tower and language model is another; attention is plain causal.

    The processor writes ``num_tokens`` image tokens an image. ``model.config.voco_baseline`` says what
    was put there, so that ``baselines.load`` can build it again from what ``save_pretrained`` wrote; of
    a model from there nothing is left to go back to, and ``undo`` puts the processor back only.
    LLaVA-1.5 only: the tiles and newlines of LLaVA-NeXT need as many features as there are patches.
    """

    trained = True
    defaults: ClassVar[dict] = {}  # of options

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        style: str | None = None,
        **options,
    ) -> None:
        self._options = {name: value for name, value in options.items() if value is not None}
        super().__init__(model, processor, num_tokens, style=style)

    @staticmethod
    @abstractmethod
    def build(config: LlavaConfig, projector: nn.Module) -> nn.Module:
        """What stands for ``projector``, as ``config.voco_baseline`` describes it, with fresh weights.

        Raises:
            ValueError: an option out of range.
        """

    def _install(self, steps: ExitStack, num_tokens: int | None) -> int:
        base, config = self.model.model, self.model.config
        if not isinstance(self.model, LlavaForConditionalGeneration):
            raise ValueError(
                f"expected LLaVA-1.5, got {type(self.model).__name__}; the features of its tiles "
                "are laid out by their patches, of which fewer would be left"
            )
        if isinstance(base.multi_modal_projector, Projector):
            saved = config.voco_baseline
            given = dict(self._options)
            if num_tokens is not None:
                given["num_tokens"] = num_tokens
            if saved != {**saved, **given}:
                raise ValueError(
                    f"expected {saved}, as the model was built, got {given}; leave num_tokens and "
                    "options out"
                )
            num_tokens = saved["num_tokens"]
        else:
            if num_tokens is None:
                raise ValueError("expected num_tokens, of an image, got None")
            facts = {"name": self.name, "num_tokens": num_tokens, **self.defaults, **self._options}
            put(steps, config, "voco_baseline", facts)
            weight = base.multi_modal_projector.linear_1.weight
            built = self.build(config, base.multi_modal_projector)
            built.to(weight.device, weight.dtype).train(self.model.training)
            put(steps, base, "multi_modal_projector", built)
        # The processor counts patches, and adds this.
        added = self.processor.num_additional_image_tokens
        added += num_tokens - tokens_written(self.processor)
        put(steps, self.processor, "num_additional_image_tokens", added)
        return num_tokens

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        return self._uniform_cost(self.num_tokens, self.num_tokens, text_tokens, dtype)


def feature_width(config: LlavaConfig) -> int:
    """Of the features that a projector reads."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
