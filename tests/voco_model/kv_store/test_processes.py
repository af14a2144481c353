"""Many processes using one store, with eviction."""

from __future__ import annotations

import os
import random
import time
import traceback

import pytest

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.format import encode

WRITERS = READERS = 8
SECONDS = 4.0
ENTRIES = [make_entry(number, tokens=1 + number % 5) for number in range(120)]
LARGEST = max(sum(map(len, encode(entry, entry.key))) for entry in ENTRIES)
LIMIT = 40 * LARGEST
HELD = 7

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def write(store: KVStore, chance: random.Random) -> int:
    # Not the held one: a new put would replace its file by one that isn't held.
    number = chance.choice([number for number in range(len(ENTRIES)) if number != HELD])
    store.put(ENTRIES[number])
    return 1


def read(store: KVStore, chance: random.Random) -> int:
    number = chance.randrange(len(ENTRIES))
    if chance.random() < 0.2:
        found = store.get_many([make_key(number), make_key((number + 1) % len(ENTRIES))])
    else:
        found = [store.get(make_key(number))]
    for offset, entry in enumerate(found):
        if entry is not None:
            assert_same(entry, ENTRIES[(number + offset) % len(ENTRIES)])
    return sum(entry is not None for entry in found)


def child(path, do, seed: int, results: int) -> None:
    """Calls ``do`` until the time is over, then reports how often it did something, or its error."""
    chance, done = random.Random(seed), 0
    try:
        with KVStore(path, max_bytes=LIMIT, fsync=False) as store:
            finish = time.monotonic() + SECONDS
            while time.monotonic() < finish:
                done += do(store, chance)
            assert store.stats().failures == {}
        os.write(results, f"{done}\n".encode())
    except BaseException:
        os.write(results, (traceback.format_exc().replace("\n", " | ") + "\n").encode())
    finally:
        os._exit(0)


@pytest.mark.slow
def test_writers_and_readers_with_eviction(tmp_path):
    with KVStore(tmp_path, max_bytes=LIMIT, fsync=False) as store:
        store.put(ENTRIES[HELD])
        reading, writing = os.pipe()
        children = []
        with store.hold(make_key(HELD)) as there:
            assert there
            for seed in range(WRITERS + READERS):
                pid = os.fork()
                if pid == 0:
                    os.close(reading)
                    child(tmp_path, write if seed < WRITERS else read, seed, writing)
                children.append(pid)
            os.close(writing)
            said = b""
            while more := os.read(reading, 65536):
                said += more
            for pid in children:
                os.waitpid(pid, 0)
            # It was never evicted, although its last use was before all others.
            assert_same(store.get(make_key(HELD)), ENTRIES[HELD])
        lines = said.decode().splitlines()
        assert len(lines) == WRITERS + READERS
        assert [line for line in lines if not line.isdigit()] == []
        assert all(int(line) > 0 for line in lines)

        stats = store.stats()
        assert stats.bytes <= LIMIT
        on_disk = {
            file.stem: file.stat().st_size for file in (tmp_path / "v1").rglob("*.safetensors")
        }
        assert (stats.entries, stats.bytes) == (len(on_disk), sum(on_disk.values()))
        assert len(on_disk) < len(ENTRIES)  # some were evicted
        assert store.verify().ok
        assert not list((tmp_path / "quarantine").iterdir())
