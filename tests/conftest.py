"""GPU tests are skipped where there is no GPU, and Triton is interpreted there."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if torch.cuda.is_available():
    # cuBLAS is deterministic, and lets torch.use_deterministic_algorithms have its way, with this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    if find_spec("triton") is not None:
        from tests.support.triton_interpreter import repair

        repair()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest tests first, or one process goes on with them when the others have nothing left.
    items.sort(key=lambda item: "test_distributed" not in item.nodeid)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
