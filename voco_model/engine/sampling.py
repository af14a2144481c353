"""Choosing the next token on the device, row by row: greedy, temperature, top-p, seeds.

A row's draw depends on its logits, its seed and how many tokens it has drawn, and on nothing else: not
on the batch it is in, nor on when it joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), in the
# signed numbers that torch has; their products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def uniform(seeds: Tensor, drawn: Tensor) -> Tensor:
    """Float32 in [0, 1), one for each pair of a seed and a number of draws, both int64."""
    # Mixed twice: neighbouring seeds must not give one another's next draw.
    bits = _mix(_mix(seeds) + drawn * _GOLDEN)
    return _shifted(bits, 40).float() * 2.0**-24


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """One token a row.

    Args:
        logits: float32 ``[b, V]``.
        temperature: float32 ``[b]``; 0 takes the likeliest token.
        top_p: float32 ``[b]`` in (0, 1]: of the tokens in falling probability, those before which less
            than this has been summed up.
        draws: float32 ``[b]`` in [0, 1), from ``uniform``.

    Returns:
        int64 ``[b]``.
    """
    greedy = logits.argmax(-1)
    scaled = logits / temperature.clamp(1e-5, 1e5)[:, None]
    falling, order = scaled.sort(dim=-1, descending=True)
    probabilities = falling.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # What is too small for float32 still keeps the first.
    kept = probabilities.masked_fill(before >= top_p.clamp(min=1e-6)[:, None], 0.0)
    mass = kept.cumsum(-1)
    # Rounding may leave the draw at the whole mass: the last kept token then. Logits that are no numbers
    # keep none; whoever asked is told elsewhere, and no index may be out of range.
    behind = (mass <= draws[:, None] * mass[:, -1:]).sum(-1)
    place = torch.minimum(behind, (kept > 0).sum(-1) - 1).clamp(min=0)
    sampled = order.gather(-1, place[:, None])[:, 0]
    return torch.where(temperature > 0, sampled, greedy)


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (bits >> count) & (2 ** (64 - count) - 1)
