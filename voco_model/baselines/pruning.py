"""Dropping vision tokens of a prompt at a layer: what ``FastV`` and ``RandomTokens`` share.

A forward pre-hook of the base model finds the image's columns and passes a ``Prompt`` to the layers, as
the keyword argument ``voco_pruning``. The method stores its ``Selection`` on the key/value cache. In a
decoding step, this selection is passed instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import Cache

from voco_model.baselines.base import Method
from voco_model.vlm.attach import check_full_attention
from voco_model.vlm.caches import CACHE_ARGUMENT

# Options of model.generate that don't work with pruned prompts, and why.
_REFUSED = {
    "prompt_lookup_num_tokens": "it reads several new tokens at once",
    "assistant_early_exit": "it reads several new tokens at once",
    "assistant_model": "it reads several new tokens at once",
    "use_mtp": "it reads several new tokens at once",
    "prefill_chunk_size": "a prompt in pieces has no last token to prune by",
    "cache_implementation": "layers have caches of different lengths, which only DynamicCache supports",
}


@dataclass(frozen=True)
class Selection:
    """The columns of a prompt that are kept.

    Attributes:
        columns: int64 ``[B, W]``, ascending; arbitrary for padding.
        real: bool ``[B, W]``, False for padding, which is on the left.
        length: S, of the prompt with its padding.
        padded: whether any row is padded.
        last: int64 ``[B or 1, 1]``, the position of the prompt's last token, if the method sets it.
    """

    columns: Tensor
    real: Tensor
    length: int
    padded: bool
    last: Tensor | None = None

    @classmethod
    def of(cls, keep: Tensor, last: Tensor | None = None) -> Selection:
        """From bool ``[B, S]``."""
        count = keep.sum(1, keepdim=True)
        width = int(count.max())
        real = torch.arange(width, device=keep.device) >= width - count
        columns = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
        return cls(columns, real, keep.shape[1], not bool(real.all()), last)

    def gather(self, x: Tensor) -> Tensor:
        """``[B or 1, S, ...]`` -> ``[B, W, ...]``."""
        columns = self.columns.to(x.device)
        rows = torch.arange(len(columns), device=x.device)[:, None]
        return x.expand(len(columns), *x.shape[1:])[rows, columns]

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """bool ``[B, 1, W, W]`` for the prompt, with ``new=0``; ``[B, 1, 1, W + new]`` for the last of
        ``new`` tokens after it. None if SDPA's own causal mask is the same."""
        if not self.padded:
            return None
        seen = F.pad(self.real, (0, new), value=True)[:, None, None].to(device)
        if new:
            return seen
        causal = torch.ones(seen.shape[-1], seen.shape[-1], dtype=torch.bool, device=device).tril()
        # Padding sees itself: a query that sees nothing would give NaN.
        return (seen & causal) | torch.eye(len(causal), dtype=torch.bool, device=device)


@dataclass
class Prompt:
    """A prompt being read.

    Attributes:
        real, is_image: bool ``[B, S]``.
        cache: receives the ``Selection`` as ``voco_pruned``; None without a cache.
        selection: set by ``keep``.
    """

    real: Tensor
    is_image: Tensor
    cache: Cache | None
    selection: Selection | None = None

    def keep(self, chosen: Tensor, last: Tensor | None = None) -> None:
        """Select these vision tokens, bool ``[B, S]``, and all tokens of the text."""
        self.selection = Selection.of(self.real & (chosen | ~self.is_image), last)
        if self.cache is not None:
            self.cache.voco_pruned = self.selection


class Pruning(Method):
    """Keeps some of an image's tokens, selected once, when the prompt is read; positions don't change.

    A forward pass returns logits of the kept tokens, ``[B, W, vocab]``. Batches are padded on the left
    and have at most one image per row. An image with fewer than ``num_tokens`` tokens keeps them all.
    The beams of a row share their selection, so ``generate`` may reorder the cache among them.
    """

    trained = False

    def _install(self, steps: ExitStack, num_tokens: int | None) -> int:
        if num_tokens is None:
            raise ValueError("expected num_tokens, the vision tokens to keep per image, got None")
        check_full_attention(self.model.config.text_config)
        steps.callback(
            self.model.register_forward_pre_hook(_refuse_labels, with_kwargs=True).remove
        )
        steps.callback(
            self.model.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove
        )
        self._hook(steps)
        return num_tokens

    @abstractmethod
    def _hook(self, steps: ExitStack) -> None:
        """Register the hooks that prune."""

    def _check_generate(self, generate_kwargs: Mapping) -> None:
        super()._check_generate(generate_kwargs)
        if self._option(generate_kwargs, "use_cache") is False:
            raise ValueError(
                "expected use_cache=True, got False; every step would prune again, by another last token"
            )
        for name, why in _REFUSED.items():
            value = self._option(generate_kwargs, name)
            if value:
                raise ValueError(f"expected no {name} with {self.name!r}, got {value!r}; {why}")

    def _option(self, generate_kwargs: Mapping, name: str) -> Any:
        """A generation option, looked up as in ``generate``: arguments, given config, model's config."""
        sources = (generate_kwargs.get("generation_config"), self.model.generation_config)
        values = (generate_kwargs.get(name), *(getattr(source, name, None) for source in sources))
        return next((value for value in values if value is not None), None)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        input_ids = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or input_ids is None:
            raise ValueError(
                f"expected input_ids, and all else by keyword, got {len(args)} positional arguments and "
                f"{sorted(name for name, value in kwargs.items() if value is not None)}"
            )
        # A caller may still use the old name, which forward accepts as well.
        cache = kwargs.setdefault(CACHE_ARGUMENT, kwargs.pop("past_key_values", None))
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"expected a DynamicCache, got {type(cache).__name__}; "
                f"{_REFUSED['cache_implementation']}"
            )
        is_image = input_ids == module.config.image_token_id
        length = input_ids.shape[1]
        if cache is not None and cache.get_seq_length() > 0:
            pruned = getattr(cache, "voco_pruned", None)
            if length > 1 and (pruned is not None or is_image.any()):
                raise ValueError(
                    f"expected one token on a pruned cache, and no image on any, got {length} "
                    "tokens; pass the whole prompt at once"
                )
            if pruned is not None:
                kwargs["voco_pruning"] = pruned
        elif is_image.any():
            real = self._real_tokens(kwargs.get("attention_mask"), input_ids)
            self._check_prompt(module, is_image, kwargs)
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = module.config.text_config.use_cache
            if cache is None and use_cache:
                # The language model would create the same cache, but where the selection can't reach it.
                cache = kwargs[CACHE_ARGUMENT] = DynamicCache(config=module.config.text_config)
            kwargs["voco_pruning"] = Prompt(real, is_image, cache)
        return args, kwargs

    def _real_tokens(self, mask: Tensor | None, input_ids: Tensor) -> Tensor:
        if mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            raise ValueError(
                f"expected an attention_mask of shape {list(input_ids.shape)}, 0 for padding, got "
                f"{list(getattr(mask, 'shape', [])) or type(mask).__name__}"
            )
        real = mask != 0
        if (real[:, 1:] < real[:, :-1]).any() or not real[:, -1].all():
            raise ValueError(
                "expected rows padded on the left, got padding after tokens; the answer follows the "
                "last column: set padding_side='left'"
            )
        return real

    def _check_prompt(self, module: nn.Module, is_image: Tensor, kwargs: Mapping) -> None:
        if module.training:
            raise ValueError(
                f"expected a model in eval mode, got one in training; {self.name!r} is training-free"
            )
        if kwargs.get("output_attentions"):
            raise ValueError(
                "expected output_attentions=False, got True; attention weights are never computed"
            )
        starts = is_image & ~F.pad(is_image, (1, -1))
        most = int(starts.sum(1).max())
        if isinstance(self.model, LlavaForConditionalGeneration):
            # Adjacent images have a single start.
            most = max(most, -(-int(is_image.sum(1).max()) // self._vision_tokens()))
        pixels = kwargs.get("pixel_values")
        with_image = int(is_image.any(1).sum())
        if most > 1 or (pixels is not None and len(pixels) != with_image):
            raise ValueError(
                f"expected at most one image in each row, got {most if most > 1 else len(pixels)} in "
                f"{'one' if most > 1 else with_image}; num_tokens applies to one image per row"
            )


def _refuse_labels(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError(
            "expected no labels, got some; logits exist for the kept tokens only, and there is nothing "
            "to train"
        )
