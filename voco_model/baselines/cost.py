"""``Cost``: what a method costs in the language model.

Only the useful operations of ``voco_model.flops`` count, without the rotary embedding's angles. The
vision tower and the projector, or what replaces it, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from voco_model.flops import head_dim_of


@dataclass(frozen=True)
class Cost:
    """The cost of one image and one question, ``[image | VoCo tokens | text]``.

    Attributes:
        tokens: tokens that represent the image.
        cache_bytes: size of the image's keys and values in the cache.
        flops_first: operations up to the logits of the answer's first token, for a new image.
        flops_again: the same for another question about an image whose keys and values are cached; equal
            to ``flops_first`` if they can't be reused.
    """

    tokens: int
    cache_bytes: int
    flops_first: int
    flops_again: int


def token_bytes(text, dtype: torch.dtype) -> int:
    """Size of one token's key and value in one layer.

    Args:
        text: the language model's config.
    """
    return 2 * text.num_key_value_heads * head_dim_of(text) * dtype.itemsize
