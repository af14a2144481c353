"""Fused attention for vision-token compression: one mask, described by two integers a token.

``MaskLayout`` says which token sees which; ``masked_attention`` is ``scaled_dot_product_attention``
under it, forward and backward, without ever touching the hidden block. ``CompactKV`` holds the keys and
values that are kept of an image; ``load_into`` writes them into a key/value cache, ``extract`` reads
them back.
"""

from voco_kernels.attention import masked_attention
from voco_kernels.attention.dispatch import backends
from voco_kernels.kv import (
    CompactKV,
    PagedKV,
    Rope,
    extract,
    load_into,
    prepare_extract,
    prepare_load,
)
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
