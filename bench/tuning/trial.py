"""A candidate's first run: it is compiled and launched once on little data, and its usage is read.

On a GPU that is done in several processes. What they compile is in Triton's cache on disk before timing
starts in another one, and a candidate that breaks its process breaks no other.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime  # Python 3.10 has two
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from bench.attention import direct, measure
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import one_image
from bench.harness.guard import first_line
from bench.tuning.candidates import Blocks
from voco_kernels.attention.backends import triton
from voco_kernels.attention.backends.triton import table as triton_table
from voco_kernels.attention.backends.triton.config import CALL_STACK

Job = tuple[str, int, Blocks]
"""Kernel, width and blocks of a candidate."""

# Lengths that are a multiple of 16 and that are none: Triton compiles a kernel for each.
_SHAPES = (one_image("try", 40, 1, 22, batch=1), one_image("try", 40, 1, 23, batch=1))

_context_lost = False  # of this process


@contextmanager
def using(job: Job, chip: int) -> Iterator[None]:
    """The Triton backend with these blocks instead of the shipped ones."""
    kernel, width, blocks = job
    rows = triton_table.TABLE[chip]
    shipped = rows[kernel, width]
    rows[kernel, width] = (*blocks, "on trial")
    try:
        yield
    finally:
        rows[kernel, width] = shipped


def try_all(
    jobs: list[Job], heads: tuple[int, int], chip: int, device: torch.device, deadline: float
) -> dict[Job, dict]:
    """Each candidate's row of the record; those that were not reached by ``deadline`` are missing.

    Args:
        heads: query heads and key/value heads; Triton compiles for their numbers, too.
        deadline: on the clock of ``time.monotonic``.
    """
    if device.type == "cpu":
        rows = {}
        for job in jobs:
            if time.monotonic() > deadline:
                break
            rows[job] = try_out(job, heads, chip, device)
        return rows
    rows, workers = {}, min(8, os.cpu_count() or 1)
    while todo := [job for job in jobs if job not in rows]:
        # The interpreter of a process is fresh, so that none inherits a CUDA context.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context)
        futures = {job: pool.submit(try_out, job, heads, chip, device) for job in todo}
        in_time = _collect(futures, rows, alone=workers == 1, deadline=deadline)
        pool.shutdown(wait=in_time, cancel_futures=True)
        if not in_time:
            break
        workers = 1  # what was lost with another's process is tried again, one after the other
    return rows


def _collect(
    futures: dict[Job, Future], rows: dict[Job, dict], *, alone: bool, deadline: float
) -> bool:
    """Put results into ``rows``; False if time is up. A process that ended takes its pool along:
    whose fault it was is known only where it was alone."""
    for job, future in futures.items():
        left = None if deadline == math.inf else max(deadline - time.monotonic(), 0)
        try:
            row = future.result(timeout=left)
        except OutOfTime:
            return False
        except BrokenProcessPool:
            if alone:
                rows[job] = _row(job, reason="ended its process")
            return True
        if row is not None:
            rows[job] = row
    return True


def try_out(job: Job, heads: tuple[int, int], chip: int, device: torch.device) -> dict | None:
    """The candidate's row; None if an earlier one has broken this process's CUDA context."""
    global _context_lost
    if _context_lost:
        return None
    kernel, width, blocks = job
    try:
        for shape in _SHAPES if device.type == "cuda" else _SHAPES[:1]:
            direction = DIRECTIONS[1]
            case = measure.make_case(
                shape, heads, width, torch.bfloat16, device, direction=direction
            )
            with using(job, chip):
                out, lse = direct.forward(triton, case)
                if kernel != "forward":
                    direct.backward(triton, case, out, lse)
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # the compiler and the launcher have many ways to refuse
        reason = first_line(error)
        try:
            if device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            _context_lost = True
            reason = f"broke the CUDA context: {reason}"
        return _row(job, reason=reason)
    if device.type == "cpu":
        return _row(job)  # interpreted: there is no machine code to ask
    usage = _usage(job)
    excess = usage["stack"] - CALL_STACK.get(chip, 0)
    return _row(job, reason=f"spills {excess} bytes a thread" if excess > 0 else None, **usage)


def head_of(job: Job) -> dict:
    """What a candidate's rows have in any case."""
    kernel, width, blocks = job
    return {"kernel": kernel, "width": width, "blocks": list(blocks)}


def _row(job: Job, *, reason: str | None = None, **usage: int) -> dict:
    row = {**head_of(job), **usage}
    return row | ({"status": "dropped", "reason": reason} if reason else {"status": "ok"})


def _usage(job: Job) -> dict[str, int]:
    """Registers and bytes of stack a thread, bytes of shared memory a program: the most of what was
    compiled for this candidate in this process."""
    from voco_kernels.attention.backends.triton import backward_kernels as triton_backward
    from voco_kernels.attention.backends.triton import forward_kernel as triton_forward

    kernel, width, blocks = job
    function = {
        "forward": triton_forward.forward_kernel,
        "dkdv": triton_backward.dkdv_kernel,
        "dq": triton_backward.dq_kernel,
    }[kernel]

    def is_mine(binary) -> bool:
        constants = {function.arg_names[path[0]]: x for path, x in binary.src.constants.items()}
        options = binary.metadata
        found = constants["BLOCK_M"], constants["BLOCK_N"], options.num_warps, options.num_stages
        return constants["HEAD_DIM"] == width and found == blocks

    compiled = function.device_caches[torch.cuda.current_device()][0].values()
    mine = [binary for binary in compiled if is_mine(binary)]
    return {
        "registers": max(binary.n_regs for binary in mine),
        "stack": max(4 * binary.n_spills for binary in mine),  # Triton counts words
        "shared": max(binary.metadata.shared for binary in mine),
    }
