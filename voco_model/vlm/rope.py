"""``rope_of``: how a model rotates its keys, in the form that compact entries carry."""

from __future__ import annotations

import sys

import torch

from voco_kernels.kv.entry import Rope


def depends_on_length(language_model) -> bool:
    """Whether a long text rotates its keys by other frequencies than a short one.

    Then a key can't be rotated on by a difference, and only short texts can be read in two passes.
    """
    kind = getattr(getattr(language_model, "rotary_emb", None), "rope_type", None) or ""
    return "dynamic" in kind or kind == "longrope"  # as Transformers asks


def length_limit(language_model) -> int | None:
    """How long a text may be for its keys to be rotated by fixed frequencies; None: as long as it is."""
    if not depends_on_length(language_model):
        return None
    rotary = language_model.rotary_emb
    if rotary.rope_type == "longrope":
        return rotary.config.rope_parameters["original_max_position_embeddings"]
    # At exactly this length the frequencies of an earlier, longer text would still be there.
    return rotary.original_max_seq_len - 1


def check_length(language_model, length: int, what: str) -> None:
    """Raise ``ValueError`` for positions at which two passes would differ from one.

    Args:
        length: the last position id and one.
        what: the words for what is read.
    """
    limit = length_limit(language_model)
    if limit is not None and length > limit:
        raise ValueError(
            f"expected {what} of at most {limit} tokens, image tokens included, got {length}: with "
            f"rope_type {language_model.rotary_emb.rope_type!r} the rotation of keys depends on the "
            "length of longer ones, and two passes would differ from one; shorten the text, or use "
            "model.generate, which reads the whole prompt at once"
        )


@torch.no_grad()
def rope_of(language_model) -> Rope | None:
    """The rotation of a Transformers language model, found by trying it on one key.

    Returns:
        None where keys are not rotated by fixed frequencies, or in a way that ``Rope`` doesn't know.
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
    # Some types scale what they rotate: the keys in an entry have it in them already.
    rotated = rotated / getattr(rotary, "attention_scaling", 1.0)
    for interleaved in (False, True):
        rope = Rope(frequencies.float().cpu(), interleaved)
        if torch.allclose(rope.rotate(key, shift), rotated, atol=1e-5):
            return rope
    return None
