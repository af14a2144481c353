"""kill -9 during ``put``: acknowledged entries are there, and no incomplete one is visible."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_model.kv_store.disk import KVStore

KILLS = 200
ENTRIES = [make_entry(number, tokens=1 + number % 3) for number in range(30)]
ROOMY = 1 << 30

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def put_until_killed(path, start: int, acknowledge: int, fsync: bool) -> None:
    """In a child: puts entries one after another, and writes a byte to the pipe after each ``put``."""
    with KVStore(path, max_bytes=ROOMY, fsync=fsync) as store:
        for number in range(start, start + 10_000):
            store.put(ENTRIES[number % len(ENTRIES)])
            os.write(acknowledge, bytes([number % len(ENTRIES)]))


def killed(path, start: int, delay: float, fsync: bool) -> list[int]:
    """The numbers of the entries that were acknowledged before the child died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            put_until_killed(path, start, writing, fsync)
        finally:
            os._exit(1)
    os.close(writing)
    acknowledged = os.read(reading, 1)  # it has started: kill it at any time from here on
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    while more := os.read(reading, 4096):
        acknowledged += more
    os.close(reading)
    return list(acknowledged)


@pytest.mark.slow
@pytest.mark.parametrize("fsync", [False, True])
def test_nothing_acknowledged_is_lost_and_nothing_half_written_seen(tmp_path, fsync):
    moments = random.Random(20 + fsync)
    ever = set()
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        for kill in range(KILLS // 2):
            # A put takes about a millisecond.
            delay = moments.uniform(0, 0.003)
            now = killed(tmp_path, moments.randrange(len(ENTRIES)), delay, fsync)
            ever.update(now)
            for number in set(now):
                assert_same(store.get(make_key(number)), ENTRIES[number])
            if kill % 10 == 0:
                for number, entry in enumerate(ENTRIES):
                    found = store.get(entry.key)
                    assert found is not None or number not in ever
            assert store.stats().failures == {}
            # If the last entry was being replaced, its predecessor is still there.
        assert len(ever) > len(ENTRIES) // 2
    with KVStore(tmp_path, max_bytes=ROOMY, fsync=False) as store:
        assert not list((tmp_path / "tmp").iterdir())  # swept
        for number in ever:
            assert_same(store.get(make_key(number)), ENTRIES[number])
        report = store.verify()
        assert report.bad == {} and report.added == []
        assert store.verify().ok
        on_disk = {
            file.stem: file.stat().st_size for file in (tmp_path / "v1").rglob("*.safetensors")
        }
        assert set(store) == set(on_disk)
        assert store.stats().bytes == sum(on_disk.values())
        assert not list((tmp_path / "quarantine").iterdir())
