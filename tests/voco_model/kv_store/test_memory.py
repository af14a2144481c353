from __future__ import annotations

import gc
import threading

import pytest
import torch

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.memory_store import MemoryStore

# bytes of kv, positions and inv_freq of an entry of make_entry
SIZE = make_entry(0).nbytes + 8 + 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_round_trip(dtype):
    store = MemoryStore(10**6)
    entry = make_entry(1, tokens=3, dtype=dtype)
    store.put(entry)
    assert_same(store.get(entry.key), entry)
    assert store.get(make_key(2)) is None
    assert entry.key in store and list(store) == [entry.key] and len(store) == 1
    assert store.delete(entry.key) and not store.delete(entry.key)
    stats = store.stats()
    assert (stats.entries, stats.bytes, stats.hits, stats.misses) == (0, 0, 1, 1)
    assert (stats.puts, stats.deletes) == (1, 1)


def test_another_key_than_the_entrys_own():
    store = MemoryStore(10**6)
    store.put(make_entry(1), make_key(2))
    assert store.get(make_key(2)).key == make_key(2)
    assert make_key(1) not in store


def test_the_least_recently_used_goes_first():
    store = MemoryStore(3 * SIZE)
    for number in range(3):
        store.put(make_entry(number))
    store.get(make_key(0))
    store.put(make_entry(3))
    assert sorted(store) == [make_key(0), make_key(2), make_key(3)]
    assert store.stats().bytes == 3 * SIZE


def test_putting_again_counts_once():
    store = MemoryStore(3 * SIZE)
    for _ in range(5):
        store.put(make_entry(1))
    assert (store.stats().entries, store.stats().bytes) == (1, SIZE)


def test_what_does_not_fit_is_refused_and_evicts_nothing():
    store = MemoryStore(3 * SIZE)
    store.put(make_entry(1))
    with pytest.raises(ValueError, match="max_bytes"):
        store.put(make_entry(2, tokens=100))
    assert list(store) == [make_key(1)]
    assert store.stats().put_failures == 1


def test_an_entry_in_use_stays_valid_without_its_place_in_the_table():
    store = MemoryStore(SIZE)
    store.put(make_entry(1))
    held = store.get(make_key(1))
    for number in range(2, 50):
        store.put(make_entry(number))
    gc.collect()
    assert make_key(1) not in store
    assert_same(held, make_entry(1))
    store.close()
    assert_same(held, make_entry(1))


def test_what_is_done_to_the_tensors_that_were_put_is_not_done_to_the_store():
    store = MemoryStore(10**6)
    entry = make_entry(1)
    store.put(entry)
    entry.kv.zero_()
    entry.positions.add_(7)
    entry.rope.inv_freq.zero_()
    assert_same(store.get(entry.key), make_entry(1))


@pytest.mark.parametrize("part", [lambda e: e.kv, lambda e: e.positions, lambda e: e.scales])
def test_an_entry_that_was_written_to_is_not_served(part, caplog):
    store = MemoryStore(10**6)
    store.put(make_entry(1, dtype=torch.int8))
    part(store.get(make_key(1)))[..., 0] = 1
    assert store.get(make_key(1)) is None
    assert store.stats().failures == {"overwritten": 1}
    assert "clone what you change" in caplog.text
    assert make_key(1) not in store and store.stats().bytes == 0


def test_verify_drops_what_was_written_to():
    store = MemoryStore("2 kB")
    for number in range(2):
        store.put(make_entry(number))
    store.get(make_key(0)).kv.zero_()
    before = store.stats()
    report = store.verify()
    assert (report.entries, report.bytes) == (1, SIZE)
    assert report.bad == {make_key(0): "overwritten"} and list(store) == [make_key(1)]
    assert store.verify().ok and store.stats().hits == before.hits


def test_entries_made_in_inference_mode():
    store = MemoryStore(10**6)
    with torch.inference_mode():
        entry = make_entry(1, dtype=torch.int8)
        store.put(entry)
        assert_same(store.get(entry.key), entry)
    assert_same(store.get(entry.key), entry)


def test_wrong_models_and_keys_are_refused():
    store = MemoryStore(10**6, fingerprint="model-b")
    with pytest.raises(ValueError, match="model-b"):
        store.put(make_entry(1))
    with pytest.raises(ValueError, match="64"):
        store.get("short")
    with pytest.raises(ValueError, match="expected max_bytes"):
        MemoryStore(-1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            MemoryStore(1, pin=True)


@pytest.mark.gpu
def test_entries_are_pinned():
    store = MemoryStore(10**6)
    store.put(make_entry(1).to("cuda"))
    got = store.get(make_key(1))
    assert got.kv.is_pinned()
    assert_same(got, make_entry(1))


def test_many_threads():
    store = MemoryStore(5 * SIZE)
    entries = [make_entry(number) for number in range(10)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(200):
                entry = entries[(seed * 7 + step * 3) % 10]
                if step % 3 == 0:
                    store.put(entry)
                elif (got := store.get(entry.key)) is not None:
                    assert_same(got, entry)
                if step % 17 == 0:
                    store.delete(entry.key)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = store.stats()
    assert stats.bytes == SIZE * stats.entries <= 5 * SIZE
