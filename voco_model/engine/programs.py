"""``Programs``: runs functions of fixed shapes as CUDA graphs, or directly without CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 2


class Programs:
    """CUDA graphs by key, recorded at their first use, in one memory pool.

    Args:
        device: of the model.
        graphs: whether to record graphs; if False, each run calls the function.
        guarded: tensors that the functions change besides their outputs. Recording runs a function
            several times; these are restored before the run that counts.
    """

    def __init__(self, device: torch.device, graphs: bool, guarded: tuple[Tensor, ...]) -> None:
        self._graphs = graphs
        self._guarded = guarded
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        # torch's own capture stream belongs to the first device that captured a graph.
        self._stream = torch.cuda.Stream(device) if graphs else None
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """Runs ``function()``, or replays its graph, and returns its outputs.

        The tensors that it reads must keep their addresses. The outputs are valid until the next run of
        any program.
        """
        if not self._graphs:
            return function()
        if key not in self._recorded:
            self._recorded[key] = self._record(function)
        graph, outputs = self._recorded[key]
        graph.replay()
        return outputs

    def _record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        before = [tensor.clone() for tensor in self._guarded]
        for _ in range(_WARM_UPS):  # compiles, selects kernels, allocates workspaces
            try:
                function()
            finally:
                for tensor, value in zip(self._guarded, before, strict=True):
                    tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile, as the store's writer does.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = function()
        return graph, outputs


def bucket(count: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``at_least``."""
    return max(at_least, 1 << max(count - 1, 0).bit_length())


def length_bucket(count: int) -> int:
    """The padded length of a prompt: a power of two from 16 to 128, then a multiple of 64."""
    return bucket(count, 16) if count <= 128 else -(-count // 64) * 64
