"""Memory for launches: entries in place or staged on the device, tables in pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.move import ALIGNMENT

# Bytes of pinned entries that kernels read over the bus themselves. More than this is first copied to
# the device by the copy engine, which starts later and runs faster. The value is an estimate that has
# not been measured; bench/kv.py times both ways.
STAGED_ABOVE = 1 << 20


class EntryMemory(NamedTuple):
    """Where a launch reads or writes an entry: its own tensors, or copies on the cache's device.

    Attributes:
        tensors: keys and values, and the scales of a quantized entry, as the launch uses them.
        originals: the entry's tensors where ``tensors`` are copies of them; otherwise empty.
    """

    tensors: tuple[Tensor, ...]
    originals: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, kv: Tensor, scales: Tensor | None, device: torch.device, staged: bool
    ) -> EntryMemory:
        """The memory of an entry, or some layers of it, for a cache on ``device``.

        Args:
            staged: copy to a CUDA device even what its kernels could read in pinned memory.
        """
        given = (kv,) if scales is None else (kv, scales)
        tensors = tuple(tensor.contiguous() for tensor in given)
        if all(_reachable(tensor, device, staged) for tensor in tensors):
            return cls(tensors, ())
        return cls(tuple(torch.empty_like(each, device=device) for each in tensors), tensors)

    def addresses(self) -> tuple[int, int]:
        """The addresses of keys and values, and of scales (0 if there are none)."""
        kv, *scales = self.tensors
        return kv.data_ptr(), scales[0].data_ptr() if scales else 0

    def copy_in(self) -> None:
        """Bring the copies up to date, on the current stream."""
        for copy, original in zip(self.tensors, self.originals, strict=False):
            copy.copy_(original, non_blocking=True)

    def copy_out(self) -> None:
        """Bring the originals up to date, and wait for that."""
        for copy, original in zip(self.tensors, self.originals, strict=False):
            original.copy_(copy)


def stages(entries: Sequence[CompactKV], device: torch.device) -> bool:
    """Whether a launch of these entries copies those in pinned memory to the device first."""
    return device.type == "cuda" and (
        sum(entry.nbytes for entry in entries if is_pinned(entry)) > STAGED_ABOVE
    )


def is_pinned(entry: CompactKV) -> bool:
    return entry.device.type == "cpu" and entry.kv.is_pinned()


def host_table(table: Tensor, device: torch.device) -> Tensor:
    """A table that the host can write and kernels on ``device`` can read."""
    return table.pin_memory() if device.type == "cuda" else table


def _reachable(tensor: Tensor, device: torch.device, staged: bool) -> bool:
    """Whether a launch on ``device`` can use a contiguous tensor where it is."""
    if device.type == "cpu":
        return tensor.device == device
    if tensor.data_ptr() % ALIGNMENT:
        return False  # a view that starts anywhere; its copy is aligned
    return tensor.device == device or (
        not staged and tensor.device.type == "cpu" and tensor.is_pinned()
    )


# Launches that may still be running, and what they read. PyTorch reuses pinned memory as soon as it is
# unreferenced, since it doesn't see reads through an address.
_running: list[tuple[torch.cuda.Event, object]] = []
_running_lock = threading.Lock()


def keep_until_done(device: torch.device, memory: object) -> None:
    """Keep a reference to ``memory`` until what the current stream has queued so far is done.

    Does nothing while a graph is captured: its tables must live as long as the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    with _running_lock:
        _running.append((event, memory))
        _running[:] = [launch for launch in _running if not launch[0].query()]
