"""Scans and shifts along rows, used to build layouts and schedules on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def last_index_where(flags: Tensor) -> Tensor:
    """int64 ``[B, S]``: at each i, the largest index <= i whose flag is set, -1 if there is none."""
    position = torch.arange(flags.shape[1], device=flags.device)
    return torch.where(flags, position, -1).cummax(dim=1).values


def next_index_where(flags: Tensor) -> Tensor:
    """int64 ``[B, S]``: at each i, the smallest index >= i whose flag is set, S if there is none."""
    length = flags.shape[1]
    position = torch.arange(length, device=flags.device)
    return torch.where(flags, position, length).flip(1).cummin(dim=1).values.flip(1)


def shift_right(values: Tensor, first: int | bool) -> Tensor:
    """``[B, S]``: each token's predecessor's value; ``first`` for the row's first token."""
    return torch.cat([torch.full_like(values[:, :1], first), values[:, :-1]], dim=1)


def shift_left(values: Tensor, last: int | bool) -> Tensor:
    """``[B, S]``: each token's successor's value; ``last`` for the row's last token."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)
