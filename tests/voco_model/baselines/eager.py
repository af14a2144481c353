"""A LLaVA's language model written down again, one row at a time, with a dense map of attention and a
mask that hides dropped tokens from a layer on."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.voco_model import tiny


class Row:
    """One row of a batch, without its padding.

    Attributes:
        ids: int64 ``[S]``.
        features: ``[image tokens, hidden]``, or None.
    """

    def __init__(self, model, ids: Tensor, features: Tensor | None) -> None:
        self.model, self.ids, self.features = model, ids, features

    @property
    def image(self) -> Tensor:
        """The image's columns."""
        return (self.ids == tiny.IMAGE).nonzero()[:, 0]

    @torch.no_grad()
    def forward(
        self,
        layer: int,
        num_tokens: int | None = None,
        kept: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits ``[S, vocab]`` and the kept columns.

        Args:
            layer: the first that doesn't see dropped tokens.
            num_tokens: to keep by the attention of layer ``layer - 1``, where ``kept`` isn't given.
            ids: in place of the row's.
        """
        language = self.model.model.language_model
        text = self.model.config.text_config
        ids = self.ids if ids is None else ids
        hidden = language.embed_tokens(ids)
        if self.features is not None:
            hidden[self.image] = self.features.to(hidden.dtype)
        length, heads, keys = len(ids), text.num_attention_heads, text.num_key_value_heads
        size = text.hidden_size // heads
        half = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.arange(length).float()[:, None] * torch.cat([half, half])
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)

        def split(x: Tensor, count: int) -> Tensor:
            return x.view(length, count, size).transpose(0, 1)

        def rotate(x: Tensor) -> Tensor:
            return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

        visible = torch.ones(length, length, dtype=torch.bool).tril()
        for index, block in enumerate(language.layers):
            if index == layer and kept is not None:
                dropped = self.image[~torch.isin(self.image, kept)]
                visible[:, dropped] = False
                visible[dropped, dropped] = True
            normed = block.input_layernorm(hidden)
            q = rotate(split(block.self_attn.q_proj(normed), heads))
            k = rotate(split(block.self_attn.k_proj(normed), keys)).repeat_interleave(
                heads // keys, 0
            )
            v = split(block.self_attn.v_proj(normed), keys).repeat_interleave(heads // keys, 0)
            scores = (q @ k.transpose(1, 2)) / size**0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            if index == layer - 1 and kept is None and self.features is not None:
                received = weights.mean(0)[-1, self.image]
                kept = self.image[received.argsort(descending=True)[:num_tokens]].sort().values
            out = (weights @ v).transpose(0, 1).reshape(length, -1)
            hidden = hidden + block.self_attn.o_proj(out)
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.model.lm_head(language.norm(hidden)), kept

    def greedy(
        self, layer: int, num_tokens: int | None, steps: int, kept: Tensor | None = None
    ) -> list[int]:
        """New tokens but for EOS, each from a pass over all before it; what the prompt kept stays."""
        logits, kept = self.forward(layer, num_tokens, kept)
        new: list[int] = []
        for _ in range(steps):
            logits[-1, tiny.EOS] = -torch.inf
            new.append(int(logits[-1].argmax()))
            ids = torch.cat([self.ids, torch.tensor(new)])
            logits, _ = self.forward(layer, kept=kept, ids=ids)
        return new


def rows_of(model, inputs: dict) -> list[Row]:
    """The rows of a batch, with their images' features."""
    vision = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    features = iter(())
    if vision:
        with torch.no_grad():
            found = model.get_image_features(**vision, return_dict=True).pooler_output
        features = iter(found)
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        own = ids[mask.bool()]
        rows.append(Row(model, own, next(features) if (own == tiny.IMAGE).any() else None))
    return rows
