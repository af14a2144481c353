"""``masked_attention``: check the arguments, choose a backend, run it."""

from voco_kernels.attention.interface import masked_attention

__all__ = ["masked_attention"]
