"""The scripts that compute-sanitizer and Nsight Compute watch, on the CPU and unwatched."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from bench import profile_kernels, sanitize
from bench.attention import direct
from bench.attention.measure import make_case, truth_of
from bench.attention.oracle import NAMES, within_limits
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import SIZES
from voco_kernels.attention import dispatch

SCRIPTS = {"sanitize": sanitize.app, "profile": profile_kernels.app}


def test_a_backend_called_directly_is_right():
    device = torch.device("cpu")
    case = make_case(
        SIZES["tiny"].shapes["G"],
        (4, 2),
        16,
        torch.float32,
        device,
        direction=DIRECTIONS[1],
    )
    backend = dispatch.load("sdpa")
    out, lse = direct.forward(backend, case)
    results = dict(zip(NAMES, (out, *direct.backward(backend, case, out, lse)), strict=True))
    assert within_limits(truth_of(case).check(results, 2))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_script_runs_the_devices_default_where_no_kernel_of_ours_can(name, monkeypatch):
    monkeypatch.setattr(direct, "OWN_KERNELS", ())  # Triton could, in the tests' interpreter
    result = CliRunner().invoke(SCRIPTS[name], [])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == {"sanitize": 5, "profile": 2}[name]
    assert all(line.startswith("sdpa, ") and "forward and backward" in line for line in lines)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_backend_that_is_not_there_is_an_error(name):
    result = CliRunner().invoke(SCRIPTS[name], ["--backend", "warp"])
    assert result.exit_code == 1 and "expected a backend among" in result.stderr


def test_the_least_tried_kernels_come_first(monkeypatch):
    case = make_case(
        SIZES["tiny"].shapes["A"],
        (4, 2),
        16,
        torch.float32,
        torch.device("cpu"),
        direction=DIRECTIONS[1],
    )
    monkeypatch.setattr(direct, "OWN_KERNELS", ("flash_attn", "reference"))
    assert direct.choose(case, None) == "reference"
    assert direct.choose(case, "sdpa") == "sdpa"
    with pytest.raises(RuntimeError, match="flash_attn"):
        direct.choose(case, "flash_attn")


def test_the_layouts_are_ragged_and_gather_more_than_a_block():
    rows, images, packed = (shape.layout("cpu") for shape in sanitize.SHAPES)
    assert (rows.visible_until == 0).any()  # padding
    assert images.schedule.kept.shape[1] % 16 and rows.length % 16 and packed.length % 16
    voco = sum(length for kind, length in sanitize.SHAPES[1].documents[0] if kind == "voco")
    assert voco > 64


def test_a_result_that_is_not_finite_is_an_error(monkeypatch):
    backend = dispatch.load("sdpa")

    def unwritten(*arguments):
        dq, dk, dv = backend_backward(*arguments)
        return dq, dk, dv.fill_(float("nan"))

    backend_backward = backend.backward
    monkeypatch.setattr(backend, "backward", unwritten)
    result = CliRunner().invoke(sanitize.app, ["--backend", "sdpa", "--head-dim", "64"])
    assert result.exit_code == 1 and "expected finite values in dv of sdpa" in result.stderr
