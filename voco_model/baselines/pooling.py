"""``Pooling``: averages of neighbouring patches."""

from __future__ import annotations

from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig

from voco_model.baselines.base import Projector
from voco_model.baselines.replaced import Replaced


class Pooling(Replaced):
    """Average pooling of the projected features, then a linear layer initialized to the identity.

    Source: "average pooling + linear" in VoCo-LLaMA (arXiv 2406.12275, Table 1), which gives no details.
    Here the grid of patches (24 x 24 in LLaVA-1.5) is divided into ``rows x columns`` fields of nearly
    equal size, where ``rows`` is the largest divisor of ``num_tokens`` up to its square root: 1 is the
    mean of all patches, 8 is 2 x 4, 64 is 8 x 8. If a side isn't a multiple, neighbouring fields
    overlap, as in torch's ``adaptive_avg_pool2d``. LLaVA's own projector comes first and is trained
    with the rest.
    """

    name = "pooling"
    label = "Average pooling + linear"
    source = "arXiv 2406.12275, Table 1"

    def __init__(
        self, model, processor, num_tokens: int | None = None, *, style: str | None = None
    ) -> None:
        super().__init__(model, processor, num_tokens, style=style)

    @staticmethod
    def build(config: LlavaConfig, projector: nn.Module) -> nn.Module:
        rows, columns = fields(config.voco_baseline["num_tokens"])
        side = config.vision_config.image_size // config.vision_config.patch_size
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                "expected vision_feature_select_strategy 'default' (patches only), got "
                f"{config.vision_feature_select_strategy!r}"
            )
        if columns > side:
            raise ValueError(
                f"expected num_tokens = rows x columns with at most {side} each, got "
                f"{rows * columns}, which is {rows} x {columns}"
            )
        return PooledProjector(projector, config.text_config.hidden_size, rows, columns)


class PooledProjector(Projector):
    """``linear(mean(projector(features)))``, with the mean of each of ``rows x columns`` fields."""

    def __init__(self, projector: nn.Module, hidden: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.projector = projector
        self.linear = nn.Linear(hidden, hidden)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projector(features)
        side = isqrt(projected.shape[1])
        grid = projected.transpose(1, 2).unflatten(2, (side, side))  # [images, hidden, side, side]
        pooled = F.adaptive_avg_pool2d(grid, (self.rows, self.columns))
        return self.linear(pooled.flatten(2).transpose(1, 2))


def fields(num_tokens: int) -> tuple[int, int]:
    """Rows and columns, as nearly square as possible; rows <= columns."""
    rows = next(n for n in range(isqrt(num_tokens), 0, -1) if num_tokens % n == 0)
    return rows, num_tokens // rows
