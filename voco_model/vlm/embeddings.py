"""Distinct embedding rows for the VoCo tokens of an image; the paper has one row for all.

All VoCo tokens keep the id of ``<VoCo>``, so prompts, masks and caches deal with one id. Only the
embedding tells them apart: the k-th token of a run has the row ``voco_token_id + k``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def name_of_row(row: int) -> str:
    """The tokenizer's token for the row of a run's VoCo token ``row``, from 1 on."""
    return f"<VoCo:{row}>"


def number_rows(
    voco_token_id: int, rows: int, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Forward pre-hook of the input embeddings, without a host sync.

    Args:
        args: ids ``[..., S]``, with complete runs of VoCo tokens: rows are counted from a run's start.
            Tokens beyond ``rows`` share the last one.
    """
    ids, *others = args
    is_voco = ids == voco_token_id
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    before_run = torch.where(is_voco, -1, position).cummax(dim=-1).values
    row = (position - before_run - 1).clamp(max=rows - 1)
    return torch.where(is_voco, ids + row.to(ids.dtype), ids), *others
