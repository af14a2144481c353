"""Tests of the CUDA loader's kernels (csrc/kv_load.cu) on the emulation."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_on_cpu.build import why_not
from tests.cuda_on_cpu.extension import emulate, load_emulation
from tests.voco_kernels.kv.moves import SCENES, Scene, check_extract, check_load
from voco_kernels.kv.loaders import cuda

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ORDERS = (0, 1, 3)
COPIES = [name for name in SCENES if SCENES[name]().build().move.is_copy]


@pytest.fixture(scope="session")
def emulation():
    return load_emulation()


@pytest.fixture(params=ORDERS, ids=lambda order: f"order {order}")
def order(request, monkeypatch, emulation):
    emulate(monkeypatch, emulation, request.param)


@pytest.fixture
def emulated(monkeypatch, emulation):
    emulate(monkeypatch, emulation)


def run(move) -> None:
    assert cuda.missing() == [] and cuda.unsupported(move) == []
    cuda.run(move)


@pytest.mark.parametrize("name", SCENES)
def test_load(order, name):
    check_load(SCENES[name]().build(), run)


@pytest.mark.parametrize("name", COPIES)
def test_extract(order, name):
    check_extract(SCENES[name]().build(), run)


@pytest.mark.parametrize("multiprocessors", [1, 50])
@pytest.mark.parametrize("rotary_dim", [0, 128])
def test_threads_with_several_units_and_with_none(
    monkeypatch, emulation, multiprocessors, rotary_dim
):
    """With one multiprocessor, threads run several iterations; some threads have no work in the last."""
    emulate(monkeypatch, emulation, 0, multiprocessors)
    scene = Scene(
        counts=(11, 1, 5), num_layers=3, num_kv_heads=8, head_dim=128, rotary_dim=rotary_dim
    )
    check_load(scene.build(), run)
    if not rotary_dim:
        check_extract(scene.build(), run)


def test_tables_are_rewritten_between_two_runs(emulated):
    """As in replays of a captured launch, the parameters are the same, but the tables differ."""
    scene = Scene(rotary_dim=64).build()
    check_load(scene, run)
    other = Scene(rotary_dim=64, shifts=(-3, 40)).build()
    for table in ("entries", "tokens", "bases", "lengths"):
        getattr(scene.move, table).copy_(getattr(other.move, table))
    other.move = scene.move
    check_load(other, run)


def test_the_emulation_finds_a_misaligned_row(emulated):
    scene = Scene().build()
    scene.move.tokens[0, 0] += 4
    with pytest.raises(RuntimeError, match="store_16 of .*: expected a multiple of 16"):
        cuda.run(scene.move)


@pytest.mark.parametrize(
    "kinds", [{"entry_dtype": torch.float16, "rotary_dim": 64}, {}], ids=["rotated", "copy"]
)
def test_a_planted_fault_is_found(emulated, kinds):
    """The checks detect a token in the adjacent token's slot, and a shift that is off by one."""
    scene = Scene(**kinds).build()

    def faulty(move) -> None:
        tokens = move.tokens.clone()
        if kinds:
            move.tokens[1, 1] += 1
        else:
            move.tokens[1, 0] += 64
        run(move)
        move.tokens.copy_(tokens)

    with pytest.raises(AssertionError):
        check_load(scene, faulty)


def test_without_the_emulation_a_device_is_needed(monkeypatch, emulation):
    emulate(monkeypatch, emulation)
    monkeypatch.setattr(cuda, "_emulated", False)
    assert cuda.unsupported(Scene().build().move) == ["expected a cache on CUDA, got cpu"]
    if not torch.cuda.is_available():
        assert cuda.missing() == ["no CUDA device of compute capability 9.0"]
    monkeypatch.setattr(cuda, "_extension", None)
    monkeypatch.setattr(cuda, "_why_not", "not built")
    assert cuda.missing() == ["not built"]
