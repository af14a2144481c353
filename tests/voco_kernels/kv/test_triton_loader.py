"""The loaders' kernels against float64: Triton's in the interpreter, both on a GPU if there is one.

Triton's is also compiled ahead of time for several chips. tests/cuda_on_cpu/ runs CUDA's without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.voco_kernels.kv.moves import (
    BF16,
    DTYPES,
    E4M3,
    FP16,
    FP32,
    HEAD_DIMS,
    INT8,
    SCENES,
    Scene,
    check_extract,
    check_load,
)
from voco_kernels.kv.loaders import triton as loader

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: requirements/triton.txt has it"
)

COMPILER = Path(__file__).parents[2] / "support" / "triton_move_aot.py"
COPIES = [name for name in SCENES if SCENES[name]().build().move.is_copy]

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)


def run(move) -> None:
    assert loader.missing() == [] and loader.unsupported(move) == []
    loader.run(move)


@interpreted
@pytest.mark.parametrize("name", SCENES)
def test_interpreted_load(name):
    check_load(SCENES[name]().build(), run)


@interpreted
@pytest.mark.parametrize("name", COPIES)
def test_interpreted_extract(name):
    check_extract(SCENES[name]().build(), run)


@interpreted
def test_interpreted_with_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(loader, "_PROGRAMS", 2)
    scene = Scene(counts=(11, 1), num_layers=3, num_kv_heads=8, head_dim=128, rotary_dim=128)
    check_load(scene.build(), run)


@interpreted
def test_a_planted_fault_is_found():
    scene = Scene(rotary_dim=64).build()

    def faulty(move) -> None:
        move.tokens[1, 1] += 1
        run(move)
        move.tokens[1, 1] -= 1

    with pytest.raises(AssertionError, match="more than allowed"):
        check_load(scene, faulty)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernel_compiles_without_spills(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(COMPILER.parents[2])
    done = subprocess.run(
        [sys.executable, COMPILER, str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == (7 if capability in (80, 90) else 3)
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["local_loads"] == 0, f"spills: {kernel}"
        assert kernel["wide_loads"] and kernel["wide_stores"], f"not by 16 bytes: {kernel}"


BAD = {
    "entry dtype": (
        {"entry_dtype": torch.float64},
        "expected entries in bfloat16, .*got torch.float64",
    ),
    "cache dtype": ({"cache_dtype": torch.float64}, "expected a cache in .*, got torch.float64"),
    "a quantized way back": (
        {"entry_dtype": INT8, "to_cache": False},
        "expected a plain copy out of the cache",
    ),
    "head_dim": ({"head_dim": 68}, "expected head_dim a multiple of 8, got 68"),
    "size": ({"most_tokens": 2**28}, r"expected entries of up to 2\*\*31 units"),
    "head_stride": (
        {"head_stride": 68},
        "head_stride that is a multiple of 16 bytes, got 68 elements",
    ),
    "rotary_dim": ({"inv_freq": torch.ones(12).double()}, "a multiple of 16 .*, got 24"),
    "too large a rotary_dim": (
        {"inv_freq": torch.ones(40).double(), "interleaved": True},
        "expected a rotary_dim up to head_dim 64",
    ),
    "inv_freq": ({"inv_freq": torch.ones(16)}, "expected float64 inv_freq, got torch.float32"),
    "no entries": ({"entries": torch.zeros(0, 4).long()}, "expected at least one entry"),
    "entries": ({"entries": torch.tensor([[8, 0, 0, 1]])}, "entries at .* multiples of 16, got 8"),
    "scales": ({"entries": torch.tensor([[16, 2, 0, 1]])}, "scales at .* multiples of 4, got 2"),
    "tokens": ({"tokens": torch.tensor([[4, 0]])}, "offsets .* multiples of 8, got 4"),
    "keys": ({"bases": torch.tensor([[8, 16]])}, "keys at .* multiples of 16, got 8"),
    "values": ({"bases": torch.tensor([[16, 8]])}, "values at .* multiples of 16, got 8"),
    "table": ({"tokens": torch.zeros(2, 3).long().t()}, "expected tokens contiguous"),
}


@interpreted
@pytest.mark.parametrize("name", BAD)
def test_what_the_kernels_cannot_move_is_refused(name):
    change, reason = BAD[name]
    move = Scene(counts=(1,), num_layers=1).build().move
    assert loader.unsupported(move) == []
    for attribute, value in change.items():
        setattr(move, attribute, value)
    (got,) = loader.unsupported(move)
    assert re.search(reason, got), got


@interpreted
def test_entries_of_8_bits_begin_at_multiples_of_8():
    move = Scene(counts=(1,), num_layers=1, entry_dtype=E4M3).build().move
    move.entries[0, 0] = 8
    assert loader.unsupported(move) == []
    move.entries[0, 0] = 12
    assert "multiples of 8, got 12" in loader.unsupported(move)[0]


@interpreted
def test_the_sanitizer_script_runs():
    sanitize = pytest.importorskip("bench.sanitize", reason="bench needs typer")
    sanitize.move("triton", 80, torch.device("cpu"))


# ---- On a GPU, both loaders.


@pytest.fixture(params=["cuda", "triton"])
def run_on_gpu(request):
    module = import_module(f"voco_kernels.kv.loaders.{request.param}")
    if module.missing():
        pytest.skip("; ".join(module.missing()))

    def run(move) -> None:
        assert module.unsupported(move) == []
        module.run(move)

    return run


where = pytest.mark.parametrize("host", [False, True], ids=["on the device", "pinned"])


@pytest.mark.gpu
@where
@pytest.mark.parametrize("name", SCENES)
def test_load_on_a_gpu(run_on_gpu, name, host):
    check_load(SCENES[name](device="cuda", host=host).build(), run_on_gpu)


@pytest.mark.gpu
@where
@pytest.mark.parametrize("name", COPIES)
def test_extract_on_a_gpu(run_on_gpu, name, host):
    check_extract(SCENES[name](device="cuda", host=host).build(), run_on_gpu)


@pytest.mark.gpu
@where
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, INT8, E4M3])
@pytest.mark.parametrize("rotary_dim", [0, 128])
def test_whole_models_on_a_gpu(run_on_gpu, dtype, rotary_dim, host):
    """The shape of LLaVA-1.5-7B, for which a block takes several turns."""
    scene = Scene(
        counts=(12, 1),
        num_layers=32,
        num_kv_heads=32,
        head_dim=128,
        entry_dtype=dtype,
        rotary_dim=rotary_dim,
        device="cuda",
        host=host,
    )
    check_load(scene.build(), run_on_gpu)


@pytest.mark.gpu
@where
@pytest.mark.parametrize("rotary_dim", [0, 64])
def test_a_captured_move_follows_its_tables(run_on_gpu, rotary_dim, host):
    kinds = dict(rotary_dim=rotary_dim, device="cuda", host=host)
    scene = Scene(**kinds).build()
    run_on_gpu(scene.move)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_on_gpu(scene.move)
    for shifts in ((5, 0, -9), (70_000,)):
        other = Scene(shifts=shifts, **kinds).build()
        for table in ("entries", "tokens", "bases", "lengths"):
            getattr(scene.move, table).copy_(getattr(other.move, table))
        other.move = scene.move
        check_load(other, lambda move: graph.replay())


def test_the_scenes_cover_dtypes_head_dims_and_paged_rotation():
    scenes = [make() for make in SCENES.values()]
    assert {(scene.entry_dtype, scene.cache_dtype) for scene in scenes} >= set(DTYPES)
    assert {scene.head_dim for scene in scenes} >= set(HEAD_DIMS)
    assert FP32.itemsize == 4 and any(scene.paged and scene.rotary_dim for scene in scenes)
