"""``BufferPool``: memory is reused, but never while a tensor refers to it."""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest
import torch

from voco_model.kv_store import buffers
from voco_model.kv_store.buffers import BufferPool

MIB = 2**20


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def over(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def test_memory_is_reused_once_unreferenced():
    pool = BufferPool(8 * MIB, pin=False)
    tensor = over(pool.lease(MIB))
    first = tensor.data_ptr()
    part = tensor.view(2, -1)[1, 5:]
    del tensor
    assert address(pool.lease(MIB)) != first  # part is still referenced
    del part
    assert address(pool.lease(MIB)) == first
    assert pool.held == 2 * MIB and pool.unpooled == 0


def test_the_warmest_memory_comes_first():
    pool = BufferPool(8 * MIB, pin=False)
    a, b = pool.lease(MIB), pool.lease(MIB)
    last = address(b)
    del a
    del b
    assert address(pool.lease(MIB)) == last


def test_memory_is_aligned_to_a_page_and_as_large_as_asked():
    pool = BufferPool(64 * MIB, pin=False)
    for size in (1, 7, 4096, 65537, 528_648, MIB, MIB + 1, 5 * MIB - 3):
        view = pool.lease(size)
        assert len(view) == size and not view.readonly
        assert address(view) % 4096 == 0


@pytest.mark.parametrize("exponent", range(17, 34))
def test_at_most_a_ninth_is_wasted(exponent):
    for size in (2**exponent, 2**exponent + 1, 2**exponent * 9 // 8 + 1, 2 ** (exponent + 1) - 1):
        assert size <= buffers._rounded(size) <= size * 9 / 8 + 1


def test_beyond_its_limit_it_keeps_nothing_and_counts():
    pool = BufferPool(2 * MIB, pin=False)
    kept = [over(pool.lease(MIB)) for _ in range(5)]
    assert (pool.held, pool.unpooled) == (2 * MIB, 3)
    assert len({tensor.data_ptr() for tensor in kept}) == 5
    for number, tensor in enumerate(kept):
        tensor.fill_(number)
    assert [int(tensor[-1]) for tensor in kept] == [0, 1, 2, 3, 4]
    del kept, tensor
    assert over(pool.lease(100 * MIB)).numel() == 100 * MIB
    assert pool.unpooled == 4
    none = BufferPool(0, pin=False)
    assert len(none.lease(5)) == 5 and (none.held, none.unpooled) == (0, 1)
    with pytest.raises(ValueError, match="expected limit >= 0 bytes"):
        BufferPool(-1)


def test_free_memory_of_one_size_gives_way_to_another():
    pool = BufferPool(2 * MIB, pin=False)
    views = [pool.lease(MIB), pool.lease(MIB)]
    del views
    view = pool.lease(2 * MIB)
    assert pool.held == 2 * MIB and pool.unpooled == 0
    assert len(view) == 2 * MIB


def test_cycles_give_memory_back_when_they_are_collected():
    pool = BufferPool(MIB, pin=False)
    cycle = [over(pool.lease(MIB))]
    first = cycle[0].data_ptr()
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert address(pool.lease(MIB)) == first and pool.unpooled == 0


def test_threads_never_get_the_same_memory():
    pool = BufferPool(16 * MIB, pin=False)
    problems = []

    def work(number: int) -> None:
        for step in range(300):
            tensor = over(pool.lease(70_000 + 30_000 * (step % 3)))
            tensor.fill_(number)
            if int(tensor.max()) != number or int(tensor.min()) != number:
                problems.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and pool.held <= 16 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_writes_to_memory_of_its_own():
    pool = BufferPool(4 * MIB, pin=False)
    free = address(pool.lease(MIB))  # returned immediately
    mine = over(pool.lease(2 * MIB)).fill_(7)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert pool.held == 0
            mine.fill_(9)
            other = over(pool.lease(MIB)).fill_(9)
            del other
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert int(mine.min()) == int(mine.max()) == 7
    assert address(pool.lease(MIB)) == free


@pytest.mark.gpu
def test_memory_is_pinned_where_there_is_cuda():
    pool = BufferPool(8 * MIB)
    tensor = over(pool.lease(MIB))
    assert tensor.is_pinned()
    assert torch.equal(tensor.cuda(non_blocking=True).cpu(), tensor)


def test_memory_that_cannot_be_pinned_is_pageable_and_logged(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch, "empty", refuse)
    pool = BufferPool(8 * MIB, pin=True)
    assert len(pool.lease(MIB)) == MIB
    assert "pageable memory, which is slower: no driver" in caplog.text
