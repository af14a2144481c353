"""Methods that replace the projector by a module that returns fewer tokens per image."""

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
    """Replaces the module between vision tower and language model; attention is plain causal.

    The processor writes ``num_tokens`` image tokens per image. ``model.config.voco_baseline`` records
    the replacement, so that ``baselines.load`` can build it again for a saved checkpoint. Such a model
    has no original projector left, and its ``undo`` restores only the processor. LLaVA-1.5 only:
    LLaVA-NeXT's tiles and newlines need as many features as there are patches.
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
        """The replacement for ``projector``, by ``config.voco_baseline``, with initial weights.

        Raises:
            ValueError: an option out of range.
        """

    def _install(self, steps: ExitStack, num_tokens: int | None) -> int:
        base, config = self.model.model, self.model.config
        if not isinstance(self.model, LlavaForConditionalGeneration):
            raise ValueError(
                f"expected LLaVA-1.5, got {type(self.model).__name__}, which arranges the features of "
                "its tiles by patches; fewer features don't fit"
            )
        if isinstance(base.multi_modal_projector, Projector):
            saved = config.voco_baseline
            given = dict(self._options)
            if num_tokens is not None:
                given["num_tokens"] = num_tokens
            if saved != {**saved, **given}:
                raise ValueError(
                    f"expected {saved}, with which the model was built, got {given}; leave num_tokens "
                    "and options out"
                )
            num_tokens = saved["num_tokens"]
        else:
            if num_tokens is None:
                raise ValueError("expected num_tokens per image, got None")
            facts = {"name": self.name, "num_tokens": num_tokens, **self.defaults, **self._options}
            put(steps, config, "voco_baseline", facts)
            weight = base.multi_modal_projector.linear_1.weight
            built = self.build(config, base.multi_modal_projector)
            built.to(weight.device, weight.dtype).train(self.model.training)
            put(steps, base, "multi_modal_projector", built)
        # The processor writes as many image tokens as there are patches, plus this.
        added = self.processor.num_additional_image_tokens
        added += num_tokens - tokens_written(self.processor)
        put(steps, self.processor, "num_additional_image_tokens", added)
        return num_tokens

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        return self._uniform_cost(self.num_tokens, self.num_tokens, text_tokens, dtype)


def feature_width(config: LlavaConfig) -> int:
    """Width of the features that a projector reads."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
