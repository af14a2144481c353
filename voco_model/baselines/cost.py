"""What a method costs in the language model, counted from its config.

A product of ``[m, k]`` and ``[k, n]`` is 2 m n k operations. Of attention, only pairs of a query and a
key that it may see count. What isn't a product (norms, softmax, rotation, activations, biases,
embedding lookups) is left out, and so are the vision tower and what stands for the projector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """Of one image and one question, ``[image | VoCo tokens | text]``.

    Attributes:
        tokens: that stand for the image.
        cache_bytes: of the keys and values kept of it.
        flops_first: up to the logits of an answer's first token, when the image is new.
        flops_again: the same for another question, with the image's keys and values kept. Where they
            can't serve another question, ``flops_first``.
    """

    tokens: int
    cache_bytes: int
    flops_first: int
    flops_again: int


def layer_flops(config, new: int, past: int = 0) -> int:
    """One decoder layer (gated MLP, grouped-query attention) on ``new`` tokens, causal, behind ``past``
    cached ones.

    Args:
        config: of the language model.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = head_dim_of(config)
    weights = 2 * hidden * heads * head_dim  # q and the output
    weights += 2 * hidden * config.num_key_value_heads * head_dim
    weights += 3 * hidden * config.intermediate_size
    pairs = new * past + new * (new + 1) // 2
    return 2 * weights * new + 4 * head_dim * heads * pairs


def head_flops(config) -> int:
    """Logits of one token."""
    return 2 * config.hidden_size * config.vocab_size


def token_bytes(config, dtype: torch.dtype) -> int:
    """Key and value of one token in one layer."""
    return 2 * config.num_key_value_heads * head_dim_of(config) * dtype.itemsize


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
