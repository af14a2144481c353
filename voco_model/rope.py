"""``rope_of``: how a model rotates its keys, in the form that compact entries carry."""

from __future__ import annotations

import sys

import torch

from voco_kernels.kv import Rope

# Types whose frequencies depend on the length of the text: a key can't be rotated on by a difference.
_BY_LENGTH = ("dynamic", "longrope")


@torch.no_grad()
def rope_of(language_model) -> Rope | None:
    """The rotation of a Transformers language model, found by trying it on one key.

    Returns:
        None where keys are not rotated by fixed frequencies, or in a way that ``Rope`` doesn't know.
    """
    rotary = getattr(language_model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    apply = getattr(sys.modules[type(language_model).__module__], "apply_rotary_pos_emb", None)
    if frequencies is None or apply is None or getattr(rotary, "rope_type", "") in _BY_LENGTH:
        return None
    key = torch.randn(1, 1, 1, 2 * frequencies.numel(), generator=torch.Generator().manual_seed(0))
    key = key.to(frequencies.device)
    shift = torch.ones(1, dtype=torch.int64, device=key.device)
    cos, sin = rotary(key, shift[None])
    _, rotated = apply(key, key, cos, sin)
    # Some types scale what they rotate: the keys in an entry have it in them already.
    rotated = rotated / getattr(rotary, "attention_scaling", 1.0)
    for interleaved in (False, True):
        rope = Rope(frequencies.float().cpu(), interleaved)
        if torch.allclose(rope.rotate(key, shift), rotated, atol=1e-5):
            return rope
    return None
