"""Useful FLOPs of a training step: real tokens and visible pairs only, without padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from voco_model.data.collate import BatchStats


@dataclass(frozen=True)
class WorkPerBatch:
    """Floating-point operations of a training step, from the model's sizes.

    Forward takes 2 operations per weight and token; backward 4, or 2 for frozen weights that gradients
    pass through. Attention takes 4 * head_dim * heads * pairs forward and 2.5 times that backward, in
    every layer. A frozen vision tower runs forward only. Recomputation (gradient checkpointing) doesn't
    count.

    Attributes:
        per_token: operations of the language model and its head for a token.
        per_pair: operations for a visible (query, key) pair, over heads and layers.
        per_tile: operations of vision tower and projector for an image.
    """

    per_token: float
    per_pair: float
    per_tile: float

    @classmethod
    def of(
        cls, model: nn.Module, *, lora: bool = False, tower_trained: bool = False
    ) -> WorkPerBatch:
        """For a LLaVA; with ``lora``, its own weights are frozen and gradients pass through them."""
        text, vision = model.config.text_config, model.config.vision_config
        layers = text.num_hidden_layers
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        weights = sum(_size(p) for n, p in model.named_parameters() if _is_product(n, "language"))
        weights += text.hidden_size * text.vocab_size
        tower = sum(_size(p) for n, p in model.named_parameters() if _is_product(n, "tower"))
        projector = sum(
            _size(p) for n, p in model.named_parameters() if _is_product(n, "projector")
        )
        patches = (vision.image_size // vision.patch_size) ** 2
        tower_attention = 4 * vision.hidden_size * vision.num_hidden_layers * (patches + 1) ** 2
        tower_forward = 2.0 * tower * (patches + 1) + tower_attention
        return cls(
            per_token=(4.0 if lora else 6.0) * weights,
            per_pair=3.5 * 4 * head_dim * text.num_attention_heads * layers,
            per_tile=tower_forward * (3 if tower_trained else 1) + 6.0 * projector * patches,
        )

    def __call__(self, stats: BatchStats) -> float:
        return (
            self.per_token * stats.tokens
            + self.per_pair * stats.pairs
            + self.per_tile * stats.tiles
        )


def _size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _is_product(name: str, part: str) -> bool:
    """Whether a parameter is a matrix that every token is multiplied by."""
    if not name.endswith("weight") or "norm" in name or "embed" in name or "lora" in name:
        return False
    inside = {
        "language": "language_model.layers",
        "tower": "vision_tower",
        "projector": "projector",
    }
    return inside[part] in name
