"""``Store.load_into``: the same cache as by ``get``, and no partial load reported as complete."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import DynamicCache

from tests.voco_kernels.kv.test_entry import llama_rope, make_entry
from tests.voco_kernels.kv.test_load import (
    CACHES,
    LAYERS,
    assert_only,
    contents,
    poison,
    static_cache,
)
from voco_model.kv_store import KVStore, disk, loading
from voco_model.kv_store.memory_store import MemoryStore


def key(number: int) -> str:
    return f"{number:064x}"


def path_of(store: KVStore, number: int):
    return store.path / "v1" / key(number)[:2] / f"{key(number)}.safetensors"


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryStore(1 << 24)
    return KVStore(tmp_path, max_bytes=1 << 24, fsync=False)


@pytest.fixture(params=["in pieces", "in place", "as a whole"])
def way(request, monkeypatch):
    """How a file is loaded: a few heads at a time, each head in place, or as a whole entry."""
    if request.param == "as a whole":
        return
    monkeypatch.setattr(disk, "STREAMED_FROM", 0)
    monkeypatch.setattr(loading, "_PIECE", 700)
    monkeypatch.setattr(loading, "_LAYERS", 5000)
    if request.param == "in place":
        monkeypatch.setattr(loading, "_READ_IN_PLACE_FROM", 0)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_get_and_load(store, way, make_cache, dtype):
    entries = [make_entry(tokens, seed=tokens, rope=llama_rope()) for tokens in (1, 3, 5)]
    for number, entry in enumerate(entries):
        store.put(entry, key(number))
    store.put(entries[0].quantize(), key(3))
    cache = make_cache(rows=3, dtype=dtype)
    # five tokens are more than a block of the paged cache: two runs
    assert store.load_into(cache, [[key(0), key(2)], [key(1)]], slots=[2, 7]) == []
    expected = [entry.to(dtype=dtype) for entry in entries]
    assert_only(cache, {(0, 2): expected[0], (0, 3): expected[2], (1, 7): expected[1]})
    poison(cache)
    assert store.load_into(cache, [key(1), key(3)], rows=[2, 0], slots=1, positions=[50, 7]) == []
    moved, plain = entries[1].rotated(50), entries[0].quantize().dequantize(dtype)
    assert_only(cache, {(2, 1): moved.to(dtype=dtype), (0, 1): plain})
    assert store.stats().hits == 5


def test_sets_the_length_as_load_into_does(store, way):
    store.put(make_entry(3), key(0))
    cache = static_cache()
    assert store.load_into(cache, key(0)) == []
    assert_only(cache, {(0, 0): make_entry(3)})
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [3] * LAYERS


def test_an_empty_dynamic_cache_is_given_tensors_or_stays_empty(tmp_path, way):
    store = KVStore(tmp_path, max_bytes=1 << 24, fsync=False)
    for number in range(2):
        store.put(make_entry(3, seed=number), key(number))
    cache = DynamicCache()
    assert store.load_into(cache, [key(0), key(1)]) == []
    assert torch.equal(contents(cache)[:, :, 1], make_entry(3, seed=1).kv)
    with open(path_of(store, 1), "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    cache = DynamicCache()
    assert store.load_into(cache, [key(0), key(1), key(1)]) == [key(1)]
    assert cache.get_seq_length() == 0
    store.put(make_entry(3, seed=1), key(1))
    assert store.load_into(cache, [key(0), key(1)]) == []
    assert cache.get_seq_length() == 3


def test_a_missing_entry_leaves_the_cache_alone(store, way):
    store.put(make_entry(3), key(0))
    cache = static_cache(rows=2)
    assert store.load_into(cache, [key(0), key(1)]) == [key(1)]
    assert contents(cache).isnan().all()
    assert int(cache.get_seq_length()) == 0
    with pytest.raises(ValueError, match="expected a key of 64"):
        store.load_into(cache, ["../../etc"])


def test_a_damaged_entry_is_missing_and_set_aside(tmp_path, way):
    store = KVStore(tmp_path, max_bytes=1 << 24, fsync=False)
    for number in range(3):
        store.put(make_entry(3, seed=number), key(number))
    with open(path_of(store, 1), "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    cache = static_cache(rows=3)
    assert store.load_into(cache, [key(0), key(1), key(2)]) == [key(1)]
    assert int(cache.get_seq_length()) == 0
    assert not path_of(store, 1).exists() and path_of(store, 0).exists()
    assert store.stats().failures == {"corrupt": 1}
    assert store.stats().quarantined == 1
    store.put(make_entry(3, seed=1), key(1))
    assert store.load_into(cache, [key(0), key(1), key(2)]) == []
    assert_only(cache, {(row, 0): make_entry(3, seed=row) for row in range(3)})


def test_a_file_cut_off_while_it_is_read_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "STREAMED_FROM", 0)
    store = KVStore(tmp_path, max_bytes=1 << 24, fsync=False)
    store.put(make_entry(3), key(0))
    prepare = loading.prepare_load

    def cut(*arguments, **options):  # after the header has been checked
        os.truncate(path_of(store, 0), 4096 + 1000)
        return prepare(*arguments, **options)

    monkeypatch.setattr(loading, "prepare_load", cut)
    cache = static_cache()
    assert store.load_into(cache, key(0)) == [key(0)]
    assert store.stats().failures == {"truncated": 1}
    assert int(cache.get_seq_length()) == 0


def test_what_does_not_fit_is_an_error_and_no_fault_of_the_entry(store, way):
    store.put(make_entry(3, layers=LAYERS + 1), key(0))
    with pytest.raises(ValueError, match="expected entries for this cache"):
        store.load_into(static_cache(), key(0))
    with pytest.raises(ValueError, match="expected slots 0 to 11"):
        store.put(make_entry(3), key(1))
        store.load_into(static_cache(), key(1), slots=10)
    assert key(0) in store and key(1) in store
