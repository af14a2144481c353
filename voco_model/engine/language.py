"""The language model as the engine runs it: embeddings in, hidden states out, keys where a step says."""

from __future__ import annotations

import torch
from torch import Tensor

from voco_model.caches import CACHE_ARGUMENT
from voco_model.engine.row_cache import RowCache, Step


class Language:
    """An enabled model's language model, and what surrounds it.

    Args:
        model: enabled, in eval mode, on one device.
        compiled: whether layers go through ``torch.compile``: inside a CUDA graph a decoding step of
            unfused layers spends more time between its kernels than in reading the weights.
    """

    def __init__(self, model, compiled: bool) -> None:
        text = model.config.text_config
        self.model = model
        self.num_layers: int = text.num_hidden_layers
        self.kv_heads: int = text.num_key_value_heads
        self.head_dim: int = (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        self.hidden_size: int = text.hidden_size
        self.embedding = model.get_input_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.dtype: torch.dtype = self.embedding.weight.dtype
        self._run = _forward
        if compiled:
            # Every shape is a program of its own, recorded once.
            limits = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096}
            compiled_forward = torch.compile(_forward, fullgraph=True, dynamic=False)
            self._run = torch._dynamo.config.patch(limits)(compiled_forward)

    def new_cache(self, rows: int, slots: int) -> RowCache:
        return RowCache(
            self.num_layers, rows, self.kv_heads, slots, self.head_dim, self.dtype, self.device
        )

    def forward(self, cache: RowCache, step: Step, embeds: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[b, T, H]`` of embeddings ``[b, T, H]`` at positions int64 ``[b, T]``."""
        cache.step = step
        mask = None
        if step.span is not None:
            seen = torch.arange(step.span, device=self.device)
            mask = seen <= step.slots[:, None, :, None]  # bool [b, 1, T, span]
        return self._run(self.model.model.language_model, cache, embeds, positions, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 ``[b, V]`` of hidden states ``[b, H]``."""
        return self.model.lm_head(hidden).float()


def _forward(
    language_model, cache: RowCache, embeds: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    # A mask of four dimensions goes through Transformers untouched; without one, attention is causal
    # and nobody looks at it.
    causal = mask is None
    if causal:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    output = language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        voco_causal=causal,
        **{CACHE_ARGUMENT: cache},
    )
    return output.last_hidden_state
