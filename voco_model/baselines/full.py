"""``Full``: nothing is compressed."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from transformers import LlavaForConditionalGeneration

from voco_model.arguments import whole_number
from voco_model.baselines.base import Method
from voco_model.baselines.cost import Cost
from voco_model.vlm.attach import attach
from voco_model.vlm.attention import hand_out_layout
from voco_model.vlm.undo import put


class Full(Method):
    """All vision tokens and plain causal attention: the upper bound.

    Source: LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744); with ``num_voco`` the upper bound of
    VoCo-LLaMA (arXiv 2406.12275, section 4.2), a model trained with VoCo tokens in its prompts and an
    unmodified mask. Prompts follow Listing 1, with the image first; LLaVA-1.5 itself puts the system
    prompt first.

    Args:
        num_tokens: leave it out; the model's own number is accepted.
        num_voco: VoCo tokens per image, 0 for none; text sees them and the vision tokens. The token, its
            row and the config are as ``enable`` sets them, so that ``"voco"`` and ``"untrained"`` can
            use the checkpoint.
        distinct: as for ``enable``; by default what the model's config says.
    """

    name = "full"
    label = "All tokens"
    source = "LLaVA-1.5, arXiv 2310.03744; upper bound of arXiv 2406.12275, section 4.2"
    trained = True

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        num_voco: int = 0,
        distinct: bool | None = None,
        style: str | None = None,
    ) -> None:
        num_voco = whole_number("num_voco", num_voco, at_least=0)
        self._options = (num_voco, distinct)
        super().__init__(model, processor, num_tokens, style=style)

    def _install(self, steps: ExitStack, num_tokens: int | None) -> int | None:
        num_voco, distinct = self._options
        own = None
        if isinstance(self.model, LlavaForConditionalGeneration):
            own = self._vision_tokens() + num_voco
        if num_tokens is not None and num_tokens != own:
            raise ValueError(
                f"expected no num_tokens, got {num_tokens}; nothing is compressed, an image has "
                f"{own or 'as many as its size requires'}"
            )
        if num_voco:
            steps.enter_context(attach(self.model, self.processor, num_voco, distinct=distinct))
            # Everything that enable does but the mask: without a layout, attention is plain causal.
            hooks = self.model.model._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is hand_out_layout]:
                del hooks[key]
            saved = {"name": self.name, "num_voco": num_voco, "distinct": distinct}
            put(steps, self.model.config, "voco_baseline", saved)
            self._num_voco = num_voco
        return own

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        image = self._vision_tokens() + self._num_voco
        return self._uniform_cost(image, image, text_tokens, dtype)
