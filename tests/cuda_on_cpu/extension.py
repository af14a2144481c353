"""The shipped extension (``csrc/``) compiled for the emulation, and its use in place of the real one."""

from __future__ import annotations

import ctypes
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.cuda_on_cpu.build import ROOT, compile_for_cpu
from voco_kernels.attention.backends import cuda_sm90
from voco_kernels.kv.loaders import cuda as cuda_loader

CSRC = ROOT / "csrc"
NAME = "_emulated"


class Emulation(NamedTuple):
    """The emulation's counterpart of ``voco_kernels._C``, and the library that it is loaded from."""

    extension: ModuleType
    library: ctypes.CDLL


def load_emulation() -> Emulation:
    sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("*.cu"))]
    path = compile_for_cpu(sources, NAME, (f"VOCO_MODULE_NAME={NAME}",), python_module=True)
    spec = spec_from_file_location(NAME, path)
    extension = module_from_spec(spec)
    spec.loader.exec_module(extension)
    return Emulation(extension, ctypes.CDLL(str(path)))


def emulate(
    patch: pytest.MonkeyPatch, emulation: Emulation, order: int = 0, multiprocessors: int = 2
) -> None:
    """Make the CUDA backend and the CUDA loader run on CPU tensors.

    Args:
        patch: reverts it.
        order: the order of a block's threads: 0 forwards, 1 backwards, otherwise a seed to shuffle them.
        multiprocessors: how many blocks share a kernel's work items.
    """
    emulation.library.emulation_order(order)
    emulation.library.emulation_multiprocessors(multiprocessors)
    for module in (cuda_sm90, cuda_loader):
        patch.setattr(module, "_extension", emulation.extension)
        patch.setattr(module, "_emulated", True)
