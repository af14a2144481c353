"""Fused attention for vision-token compression: one mask, described by two integers a token.

``MaskLayout`` says who sees whom; ``masked_attention`` is ``scaled_dot_product_attention``
under it, forward and backward, without ever touching the hidden block. ``CompactKV`` is what an image
leaves behind under that mask; ``load_into`` puts it into a key/value cache, ``extract`` takes it out.
"""

from voco_kernels.attention import masked_attention
from voco_kernels.cache_view import PagedKV
from voco_kernels.dispatch import backends
from voco_kernels.kv import CompactKV, Rope
from voco_kernels.kv_load import extract, load_into, prepare_extract, prepare_load
from voco_kernels.layout import MaskLayout

__all__ = [
    "CompactKV",
    "MaskLayout",
    "PagedKV",
    "Rope",
    "backends",
    "extract",
    "load_into",
    "masked_attention",
    "prepare_extract",
    "prepare_load",
]
__version__ = "0.1.0"
