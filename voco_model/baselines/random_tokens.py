"""``RandomTokens``: random vision tokens, the floor for methods that select them."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from voco_model.arguments import whole_number
from voco_model.baselines.cost import Cost
from voco_model.baselines.pruning import Prompt, Pruning, Selection
from voco_model.vlm.caches import CACHE_ARGUMENT


class RandomTokens(Pruning):
    """Keeps ``num_tokens`` random vision tokens per image, in all layers, at their positions.

    The selection depends only on the seed and the image's pixels in the model's dtype, not on question
    or batch; that of a smaller ``num_tokens`` is a subset. LLaVA-1.5 only.

    Source: FastV's pruning (arXiv 2403.06764) at layer 0, at random instead of by attention.

    Args:
        seed: 0 or more.
    """

    name = "random"
    label = "Random tokens"
    source = "the floor of arXiv 2403.06764: tokens at random, from layer 0 on"

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        seed: int = 0,
        style: str | None = None,
    ) -> None:
        self.seed = whole_number("seed", seed, at_least=0)
        self._drawn: list[int] | None = None  # one seed per image of the tower's last call
        super().__init__(model, processor, num_tokens, style=style)

    def _hook(self, steps: ExitStack) -> None:
        if not isinstance(self.model, LlavaForConditionalGeneration):
            raise ValueError(
                f"expected LLaVA-1.5, got {type(self.model).__name__}, whose tiles can't be assigned to "
                "images by their pixels"
            )
        # The tower always gets the pixels; Transformers may run it before the first step.
        parts = {
            self.model.model.vision_tower: self._before_tower,
            self.model.model.language_model: self._before_language_model,
        }
        for module, hook in parts.items():
            steps.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        self._drawn = [self._seed_of(image) for image in pixels]

    def _seed_of(self, image: Tensor) -> int:
        pixels = image.to(self.model.dtype).float().cpu().contiguous().numpy()
        made = hashlib.blake2b(self.seed.to_bytes(16, "little"), digest_size=7)
        made.update(pixels.tobytes())
        return int.from_bytes(made.digest(), "little")

    def _before_language_model(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        pruning = kwargs.get("voco_pruning")
        if pruning is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "voco_pruning"}
        if isinstance(pruning, Selection):
            # Dropped tokens aren't in the cache, so its length isn't a position.
            steps = kwargs[CACHE_ARGUMENT].get_seq_length() + 1 - pruning.columns.shape[1]
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = pruning.last.expand(len(pruning.columns), 1) + steps
            kwargs["attention_mask"] = F.pad(pruning.real, (0, steps), value=True).long()
            return args, kwargs
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(pruning.real.shape[1], device=pruning.real.device)[None]
        pruning.keep(self._chosen(pruning), last=position_ids[:, -1:])
        selection = pruning.selection
        kwargs["inputs_embeds"] = selection.gather(kwargs["inputs_embeds"])
        kwargs["position_ids"] = selection.gather(position_ids)
        kwargs["attention_mask"] = selection.real.long()
        return args, kwargs

    def _chosen(self, prompt: Prompt) -> Tensor:
        rows = prompt.is_image.any(1).nonzero()[:, 0].tolist()
        seeds, self._drawn = self._drawn, None
        if not seeds or len(rows) % len(seeds):
            raise ValueError(
                f"expected pixel_values of {len(rows)} images, got {len(seeds or [])}; the kept tokens "
                "depend on the pixels"
            )
        copies = len(rows) // len(seeds)  # of each prompt, with num_return_sequences
        chosen = torch.zeros_like(prompt.is_image)
        for place, row in enumerate(rows):
            columns = prompt.is_image[row].nonzero()[:, 0]
            generator = torch.Generator().manual_seed(seeds[place // copies])
            drawn = torch.randperm(len(columns), generator=generator)[: self.num_tokens]
            chosen[row, columns[drawn.to(columns.device)]] = True
        return chosen

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        kept = min(self.num_tokens, self._vision_tokens())
        return self._uniform_cost(kept, kept, text_tokens, dtype)
