"""Tests of TRITON_INTERPRET=1, which our error recommends: results are right, or an error says why not.

They run in a new process because other tests run with a repaired interpreter.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.voco_kernels.kv.moves import BF16, FP32, INT8, Scene
from voco_kernels import backends, interpreter
from voco_kernels.attention.backends import triton as backend
from voco_kernels.attention.backends.triton import launch
from voco_kernels.kv.loaders import triton as loader

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: requirements/triton.txt has it"
)
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)

PROGRAM = """
import json, torch
from voco_kernels import MaskLayout, masked_attention
layout = MaskLayout.from_lengths(9, 1, 7)
found = {}
for dtype in (torch.float32, torch.bfloat16):
    waves = (torch.linspace(-i, i, 17 * 16).sin() for i in (1, 2, 3))
    q, k, v = (wave.view(1, 1, 17, 16).to(dtype) for wave in waves)
    try:
        out = masked_attention(q, k, v, layout, backend="triton")
        exact = masked_attention(q.double(), k.double(), v.double(), layout, backend="reference")
        found[str(dtype)] = float((out - exact).abs().max())
    except RuntimeError as error:
        found[str(dtype)] = str(error)
print(json.dumps(found))
"""


def test_what_is_recommended_is_right_or_refused():
    """With any versions of Triton and NumPy, results are never wrong."""
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.getcwd())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    for dtype, found in json.loads(done.stdout.splitlines()[-1]).items():
        if isinstance(found, str):
            assert f"Triton {triton.__version__}'s interpreter" in found
            assert dtype.removeprefix("torch.") in found and "use " in found
        else:
            assert found < 16 * torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_repaired_interpreter_passes(dtype):
    assert interpreter.attention_reasons(dtype) == []


@pytest.fixture
def fresh_checks():
    interpreter._reasons.cache_clear()
    yield
    interpreter._reasons.cache_clear()


@interpreted
def test_a_kernel_that_computes_wrong_is_refused(monkeypatch, fresh_checks):
    right = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *call: (right(*call)[0] * 1.01, right(*call)[1]))
    q = torch.zeros(1, 1, 4, 16)
    (reason,) = backend.unsupported(q, q, q)
    assert "interpreter computes float32 wrong" in reason


@interpreted
def test_an_interpreter_that_raises_is_a_reason(monkeypatch, fresh_checks):
    def fails(*_):
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(backend, "forward", fails)
    q = torch.zeros(1, 1, 4, 16)
    (reason,) = backend.unsupported(q, q, q)
    assert "fails with NumPy" in reason and "TypeError: only 0-dimensional arrays" in reason


@interpreted
@pytest.mark.parametrize(
    "scene", [{"rotary_dim": 64}, {"entry_dtype": FP32}, {"entry_dtype": INT8}]
)
def test_a_loader_that_cuts_bfloat16_off_is_refused(monkeypatch, fresh_checks, scene):
    """Interpreters that aren't repaired truncate to bfloat16; a GPU rounds."""
    right = loader.run

    def cuts_off(move):
        right(move)
        for address in move.bases.flatten().tolist():
            element = ctypes.c_uint16.from_address(address + 2 * 3)
            element.value ^= 1

    move = Scene(counts=(1,), cache_dtype=BF16, **scene).build().move
    assert loader.unsupported(move) == []
    interpreter._reasons.cache_clear()
    monkeypatch.setattr(loader, "run", cuts_off)
    (reason,) = loader.unsupported(move)
    assert "to bfloat16 wrong" in reason


def test_checks_run_under_any_mode_of_the_caller(fresh_checks):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    with (
        torch._subclasses.FakeTensorMode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        assert interpreter.attention_reasons(torch.float32) == []


def test_the_hint_is_in_the_reasons_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "set before the start" in backends()["triton"][0]
