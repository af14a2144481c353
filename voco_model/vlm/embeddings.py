"""An embedding row for each VoCo token of an image, where the paper has one row for all of them.

In token ids every VoCo token stays ``<VoCo>``: prompts, masks and caches know one id. Only the
embedding looks further: the k-th token of a run has the row ``voco_token_id + k``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def name_of_row(row: int) -> str:
    """What the tokenizer calls the row of the VoCo token ``row`` of a run, from 1 on."""
    return f"<VoCo:{row}>"


def number_rows(
    voco_token_id: int, rows: int, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Forward pre-hook of the input embeddings, without a host sync.

    Args:
        args: ids ``[..., S]``. A run of VoCo tokens must not be cut: its rows count from its start.
            Tokens beyond ``rows`` share the last one.
    """
    ids, *others = args
    is_voco = ids == voco_token_id
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    before_run = torch.where(is_voco, -1, position).cummax(dim=-1).values
    row = (position - before_run - 1).clamp(max=rows - 1)
    return torch.where(is_voco, ids + row.to(ids.dtype), ids), *others
