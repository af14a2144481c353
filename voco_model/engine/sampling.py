"""Choosing the next token of each row on the device: greedy, or by temperature, top-p and seed.

A row's draw depends only on its logits, its seed and the number of tokens it has drawn; not on the rest
of the batch, nor on when the row joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014) in torch's
# signed integers, whose products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def uniform(seeds: Tensor, drawn: Tensor) -> Tensor:
    """Float32 ``[b]`` in [0, 1), from a seed and a number of draws each, both int64 ``[b]``."""
    # Mixed twice, or a draw could repeat the next one of a neighbouring seed.
    bits = _mix(_mix(seeds) + drawn * _GOLDEN)
    return _shifted(bits, 40).float() * 2.0**-24


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """Chooses a token for each row.

    Args:
        logits: float32 ``[b, V]``.
        temperature: float32 ``[b]``; 0 takes the likeliest token.
        top_p: float32 ``[b]`` in (0, 1]: in order of falling probability, a token may be drawn if those
            before it sum to less than this.
        draws: float32 ``[b]`` in [0, 1), from ``uniform``.

    Returns:
        int64 ``[b]``.
    """
    greedy = logits.argmax(-1)
    scaled = logits / temperature.clamp(1e-5, 1e5)[:, None]
    falling, order = scaled.sort(dim=-1, descending=True)
    probabilities = falling.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The clamp keeps the first token if top_p underflows.
    kept = probabilities.masked_fill(before >= top_p.clamp(min=1e-6)[:, None], 0.0)
    mass = kept.cumsum(-1)
    # If rounding puts the draw at the whole mass, take the last kept token. NaN logits keep none: the
    # index must be valid even then (the caller detects them separately).
    passed = (mass <= draws[:, None] * mass[:, -1:]).sum(-1)
    place = torch.minimum(passed, (kept > 0).sum(-1) - 1).clamp(min=0)
    sampled = order.gather(-1, place[:, None])[:, 0]
    return torch.where(temperature > 0, sampled, greedy)


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> count) & (2 ** (64 - count) - 1)
