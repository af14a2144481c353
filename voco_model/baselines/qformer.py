"""``QFormer``: learned queries that attend to the vision tower's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, LlavaConfig

from voco_model.arguments import whole_number
from voco_model.baselines.base import Projector
from voco_model.baselines.replaced import Replaced, feature_width


class QFormer(Replaced):
    """A Q-Former with ``num_tokens`` queries, then a linear layer to the language model's width.

    Source: BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1), with which VoCo-LLaMA compares (arXiv
    2406.12275, Table 1). BLIP-2's is a BERT-base with 12 layers, width 768 and cross-attention in every
    other layer, pretrained on image-text pairs in two stages; VoCo-LLaMA doesn't state its depth. Here
    it starts from random weights and reads CLIP's features instead of EVA's, without LLaVA's projector.

    Args:
        layers, width, heads: sizes of the Q-Former; by default 2, 768 and 12. BLIP-2 has 12, 768 and 12.
        cross_attention_frequency: 1, the default, for cross-attention in every layer; 2 in BLIP-2.
        initializer_range: standard deviation of initial weights; by default 0.02, as in BLIP-2. Narrow
            models learn faster with ``width**-0.5``.
        dropout: dropout of hidden states and attention in training; by default 0.1, as in BLIP-2.
    """

    name = "qformer"
    label = "Q-Former"
    source = "arXiv 2301.12597, section 3.1; arXiv 2406.12275, Table 1"
    defaults = {
        "layers": 2,
        "width": 768,
        "heads": 12,
        "cross_attention_frequency": 1,
        "initializer_range": 0.02,
        "dropout": 0.1,
    }

    def __init__(
        self,
        model,
        processor,
        num_tokens: int | None = None,
        *,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        cross_attention_frequency: int | None = None,
        initializer_range: float | None = None,
        dropout: float | None = None,
        style: str | None = None,
    ) -> None:
        super().__init__(
            model,
            processor,
            num_tokens,
            style=style,
            layers=layers,
            width=width,
            heads=heads,
            cross_attention_frequency=cross_attention_frequency,
            initializer_range=initializer_range,
            dropout=dropout,
        )

    @staticmethod
    def build(config: LlavaConfig, projector: nn.Module) -> nn.Module:
        facts = config.voco_baseline
        for name in ("layers", "width", "heads", "cross_attention_frequency"):
            whole_number(name, facts[name], at_least=1)
        if facts["width"] % facts["heads"]:
            raise ValueError(
                f"expected a width divisible by the number of heads, got {facts['width']} and "
                f"{facts['heads']} heads"
            )
        if not facts["initializer_range"] > 0:
            raise ValueError(f"expected an initializer_range > 0, got {facts['initializer_range']}")
        if not 0 <= facts["dropout"] < 1:
            raise ValueError(f"expected a dropout from 0 to below 1, got {facts['dropout']}")
        return QFormerProjector(
            Blip2QFormerConfig(
                encoder_hidden_size=feature_width(config),
                hidden_size=facts["width"],
                intermediate_size=4 * facts["width"],
                num_hidden_layers=facts["layers"],
                num_attention_heads=facts["heads"],
                cross_attention_frequency=facts["cross_attention_frequency"],
                initializer_range=facts["initializer_range"],
                hidden_dropout_prob=facts["dropout"],
                attention_probs_dropout_prob=facts["dropout"],
            ),
            facts["num_tokens"],
            config.text_config.hidden_size,
        )


class QFormerProjector(Projector):
    """``linear(q_former(query, features))``."""

    def __init__(self, config: Blip2QFormerConfig, num_tokens: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, num_tokens, config.hidden_size))
        nn.init.normal_(self.query, std=config.initializer_range)
        self.q_former = Blip2QFormerModel(config)
        self.linear = nn.Linear(config.hidden_size, hidden)
        nn.init.normal_(self.linear.weight, std=config.initializer_range)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        read = self.q_former(
            query_embeds=self.query.expand(len(features), -1, -1), encoder_hidden_states=features
        ).last_hidden_state
        return self.linear(read)
