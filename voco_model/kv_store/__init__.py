"""Stores of compact entries: on a disk, in Redis, in memory, in an object store, in tiers of these."""

from voco_model.kv_store.base import Store, StoreStats
from voco_model.kv_store.disk import KVStore

__all__ = ["KVStore", "Store", "StoreStats"]
