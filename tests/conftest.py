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

# What `make quick` runs: of each part the tests that tell most in two minutes on two cores.
QUICK = (
    "tests/bench/test_report.py",
    "tests/test_house.py",
    "tests/voco_kernels/attention/test_attention.py",
    "tests/voco_kernels/attention/test_autograd.py",
    "tests/voco_kernels/attention/test_dispatch.py",
    "tests/voco_kernels/attention/test_validation.py",
    "tests/voco_kernels/kv/test_entry.py",
    "tests/voco_kernels/kv/test_load.py",
    "tests/voco_kernels/layout/test_documents.py",
    "tests/voco_kernels/layout/test_layout.py",
    "tests/voco_model/data/test_encode.py",
    "tests/voco_model/data/test_plan.py",
    "tests/voco_model/engine/test_sampling.py",
    "tests/voco_model/kv_store/test_format.py",
    "tests/voco_model/kv_store/test_memory.py",
    "tests/voco_model/kv_store/test_open.py",
    "tests/voco_model/pictures/test_modes.py",
    "tests/voco_model/vlm/test_compress.py",
    "tests/voco_model/vlm/test_enable.py",
    "tests/voco_model/vlm/test_generate.py",
    "tests/voco_model/vlm/test_masked_pass.py",
    "tests/voco_model/vlm/test_prompt.py",
    "tests/voco_model/vlm/test_two_pass.py",
)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest tests first, or one process goes on with them when the others have nothing left.
    items.sort(key=lambda item: "test_distributed" not in item.nodeid)
    for item in items:
        slow = item.get_closest_marker("slow") or "triton" in item.name  # interpreted: seconds each
        if item.nodeid.startswith(QUICK) and not slow:
            item.add_marker(pytest.mark.quick)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
