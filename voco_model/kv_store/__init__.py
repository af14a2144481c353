"""Stores of compact entries: on disk, in Redis, in memory, in an object store, or in tiers of these."""

from voco_model.kv_store.base import Store, StoreStats, VerifyReport
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.open import open_store

__all__ = ["KVStore", "Store", "StoreStats", "VerifyReport", "open_store"]
