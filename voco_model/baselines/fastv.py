"""``FastV``: keeps the vision tokens that get most of the last token's attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from voco_model.arguments import whole_number
from voco_model.baselines.cost import Cost, token_bytes
from voco_model.baselines.pruning import Prompt, Pruning, Selection
from voco_model.flops import decoder_layer, head, head_dim_of
from voco_model.vlm.caches import CACHE_ARGUMENT

ATTENTION_NAME = "voco-fastv"


class FastV(Pruning):
    """From one layer on, keeps only the vision tokens that the prompt's last token attends to most.

    Source: FastV (Chen et al. 2024, arXiv 2403.06764, section 4), following its authors' code
    (pkunlp-icler/FastV, d165972): a token's score is the attention that it gets from the last token in
    layer ``layer - 1``, averaged over heads. (The paper's text describes the attention from all tokens.)
    Layers before ``layer`` read and cache everything; positions don't change. Their code drops
    ``R * 576`` tokens, so ``num_tokens`` is ``576 * (1 - R)``. Differences: this class computes one row
    of scores beside SDPA instead of a layer's full attention map, supports batches, rows without an
    image and grouped queries, and computes attention weights in float32.

    Args:
        num_tokens: vision tokens to keep. With all of an image's tokens, this is the plain model.
        layer: K, the first layer, counted from 0, that reads the kept tokens only; 2 in their code.
    """

    name = "fastv"
    label = "FastV"
    source = "arXiv 2403.06764, section 4; code pkunlp-icler/FastV d165972"

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        layer: int = 2,
        style: str | None = None,
    ) -> None:
        self.layer = whole_number("layer", layer, at_least=1)
        super().__init__(model, processor, num_tokens, style=style)

    def _hook(self, steps: ExitStack) -> None:
        layers = self.model.model.language_model.layers
        if self.layer >= len(layers):
            raise ValueError(
                f"expected a layer from 1 to {len(layers) - 1}, got {self.layer}; no layer would "
                "read fewer tokens"
            )
        before = self.model.config.text_config._attn_implementation
        steps.callback(self.model.set_attn_implementation, {"text_config": before})
        self.model.set_attn_implementation({"text_config": ATTENTION_NAME})
        hooks = {self.layer - 1: self._before_scores}
        hooks |= {n: partial(self._before_layer, n) for n in range(self.layer, len(layers))}
        for index, hook in hooks.items():
            handle = layers[index].register_forward_pre_hook(hook, with_kwargs=True)
            steps.callback(handle.remove)

    def _before_scores(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        prompt = kwargs.get("voco_pruning")
        if not isinstance(prompt, Prompt):
            return None
        return args, {**kwargs, "voco_scores": partial(self._choose, prompt)}

    def _choose(self, prompt: Prompt, query: Tensor, key: Tensor, scaling: float | None) -> None:
        scores = last_token_attention(query, key, prompt.real.to(query.device), scaling)
        is_image = prompt.is_image.to(scores.device)
        count = min(self.num_tokens, scores.shape[1])
        best = scores.masked_fill(~is_image, -1.0).topk(count, dim=1)
        chosen = torch.zeros_like(is_image).scatter_(1, best.indices, True) & is_image
        prompt.keep(chosen.to(prompt.real.device))

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        pruning = kwargs.get("voco_pruning")
        if pruning is None:
            return None
        kwargs = dict(kwargs)
        # Some text models pass it by keyword, others don't.
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if isinstance(pruning, Selection):
            held = kwargs[CACHE_ARGUMENT].get_seq_length(index)
            new = held + 1 - pruning.columns.shape[1]
            kwargs["attention_mask"] = pruning.mask(new, hidden_states.device)
            return args, kwargs
        selection = pruning.selection
        if selection is None:
            raise ValueError(
                f"expected attention {ATTENTION_NAME!r}, got "
                f"{self.model.config.text_config._attn_implementation!r}, which doesn't select tokens; "
                "don't change the model's attention before undo()"
            )
        if index == self.layer:
            hidden_states = selection.gather(hidden_states)
        kwargs["attention_mask"] = selection.mask(0, hidden_states.device)
        kwargs["position_embeddings"] = tuple(map(selection.gather, kwargs["position_embeddings"]))
        kwargs["position_ids"] = selection.gather(kwargs["position_ids"])
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}

    def cost(self, text_tokens: int, dtype: torch.dtype | None = None) -> Cost:
        """As ``Method.cost``, with the row of scores. The kept tokens depend on the question, so each
        question reads the image again."""
        text_tokens = whole_number("text_tokens", text_tokens, at_least=1)
        image, text = self._vision_tokens(), self.model.config.text_config
        kept = min(self.num_tokens, image)
        later = text.num_hidden_layers - self.layer
        scores = 2 * head_dim_of(text) * text.num_attention_heads * (image + text_tokens)
        flops = (
            self.layer * decoder_layer(text, image + text_tokens).useful
            + scores
            + later * decoder_layer(text, kept + text_tokens).useful
            + head(self.model.config).useful
        )
        held = self.layer * image + later * kept
        return Cost(
            tokens=kept,
            cache_bytes=held * token_bytes(text, dtype or self.model.dtype),
            flops_first=flops,
            flops_again=flops,
        )


def last_token_attention(
    query: Tensor, key: Tensor, real: Tensor, scaling: float | None = None
) -> Tensor:
    """Softmax attention of the last query, averaged over heads.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        real: bool ``[B, S]``, False for padding.

    Returns:
        float32 ``[B, S]``; each row sums to 1.
    """
    batch, _, _, head_dim = query.shape
    last = query[:, :, -1].reshape(batch, key.shape[1], -1, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scores = (last @ key.transpose(2, 3)).float() * scale  # [B, Hkv, groups, S]
    scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    return scores.softmax(dim=-1).mean(dim=(1, 2))


def fastv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    voco_scores: Callable[[Tensor, Tensor, float | None], None] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An ``AttentionInterface`` function: SDPA, which also passes query and key to ``voco_scores``."""
    if voco_scores is not None:
        voco_scores(query, key, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, fastv_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
