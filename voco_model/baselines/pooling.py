"""``Pooling``: the mean of neighbours."""

from __future__ import annotations

from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig

from voco_model.baselines.base import Projector
from voco_model.baselines.replaced import Replaced


class Pooling(Replaced):
    """Average pooling of the projected features, and a linear layer that starts as the identity.

    Source: "average pooling + linear" of VoCo-LLaMA (arXiv 2406.12275, Table 1), which says no more
    about it. Here the grid of patches (24 x 24 in LLaVA-1.5) is cut into ``rows x columns`` fields of
    nearly equal size, ``rows`` being the largest divisor of ``num_tokens`` up to its square root: 1 is
    the mean of all, 8 is 2 x 4, 64 is 8 x 8. Where a side isn't a multiple, fields share a row of
    patches, as those of torch's ``adaptive_avg_pool2d`` do. LLaVA's own projector stays in front, and
    is tuned with the rest.
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
                "expected vision_feature_select_strategy 'default', features of patches alone, got "
                f"{config.vision_feature_select_strategy!r}"
            )
        if columns > side:
            raise ValueError(
                f"expected num_tokens that are rows x columns of at most {side} each, got "
                f"{rows * columns}, which is {rows} x {columns}"
            )
        return PooledProjector(projector, config.text_config.hidden_size, rows, columns)


class PooledProjector(Projector):
    """``linear(mean(projector(features)))``, means of ``rows x columns`` fields of the square grid."""

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
    """Rows and columns, as near to a square as whole numbers allow; rows <= columns."""
    rows = next(n for n in range(isqrt(num_tokens), 0, -1) if num_tokens % n == 0)
    return rows, num_tokens // rows
