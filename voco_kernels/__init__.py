"""Fused attention for vision-token compression: one mask, described by two integers a token.

``MaskLayout`` says who sees whom; ``masked_attention`` is ``scaled_dot_product_attention``
under it, forward and backward, without ever touching the hidden block.
"""

from voco_kernels.attention import masked_attention
from voco_kernels.dispatch import backends
from voco_kernels.layout import MaskLayout

__all__ = ["MaskLayout", "backends", "masked_attention"]
__version__ = "0.1.0"
