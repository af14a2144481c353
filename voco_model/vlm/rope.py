"""A model's rotary position embedding, as stored in compact entries, and its limits."""

from __future__ import annotations

import sys

import torch

from voco_kernels.kv.entry import Rope


def depends_on_length(language_model) -> bool:
    """Whether the rotation's frequencies depend on the length of the text.

    If so, keys can't be moved by rotating them further, and two passes can only read short texts.
    """
    kind = getattr(getattr(language_model, "rotary_emb", None), "rope_type", None) or ""
    return "dynamic" in kind or kind == "longrope"  # the condition in Transformers


def length_limit(language_model) -> int | None:
    """The longest text whose keys are rotated by fixed frequencies; None for no limit."""
    if not depends_on_length(language_model):
        return None
    rotary = language_model.rotary_emb
    if rotary.rope_type == "longrope":
        return rotary.config.rope_parameters["original_max_position_embeddings"]
    # At exactly this length, the frequencies of an earlier, longer text would still be in use.
    return rotary.original_max_seq_len - 1


def check_length(language_model, length: int, what: str) -> None:
    """Raise ``ValueError`` for positions at which two passes would differ from one.

    Args:
        length: the last position id plus one.
        what: a name for the text, for the message.
    """
    limit = length_limit(language_model)
    if limit is not None and length > limit:
        raise ValueError(
            f"expected {what} of at most {limit} tokens, image tokens included, got {length}: with "
            f"rope_type {language_model.rotary_emb.rope_type!r} the rotation of longer texts depends on "
            "their length, and two passes would differ from one; shorten the text, or use "
            "model.generate, which reads the whole prompt at once"
        )


@torch.no_grad()
def rope_of(language_model) -> Rope | None:
    """The rotation of a Transformers language model, determined by applying it to one key.

    Returns:
        None if keys are not rotated by fixed frequencies, or in a way that ``Rope`` doesn't support.
    """
    rotary = getattr(language_model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    apply = getattr(sys.modules[type(language_model).__module__], "apply_rotary_pos_emb", None)
    if frequencies is None or apply is None or depends_on_length(language_model):
        return None
    key = torch.randn(1, 1, 1, 2 * frequencies.numel(), generator=torch.Generator().manual_seed(0))
    key = key.to(frequencies.device)
    shift = torch.ones(1, dtype=torch.int64, device=key.device)
    cos, sin = rotary(key, shift[None])
    _, rotated = apply(key, key, cos, sin)
    # Some types also scale keys; those in an entry are scaled already.
    rotated = rotated / getattr(rotary, "attention_scaling", 1.0)
    for interleaved in (False, True):
        rope = Rope(frequencies.float().cpu(), interleaved)
        if torch.allclose(rope.rotate(key, shift), rotated, atol=1e-5):
            return rope
    return None
