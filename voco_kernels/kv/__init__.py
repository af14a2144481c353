"""Compact key/value entries: ``CompactKV``, and ``load_into`` and ``extract`` for caches."""

from voco_kernels.kv.cache_view import PagedKV
from voco_kernels.kv.entry import CompactKV, Rope
from voco_kernels.kv.load import extract, load_into, prepare_extract, prepare_load

__all__ = [
    "CompactKV",
    "PagedKV",
    "Rope",
    "extract",
    "load_into",
    "prepare_extract",
    "prepare_load",
]
