"""Tests of voco_kernels.compiler: its decorators are torch's, without importing torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from voco_kernels.compiler import assume_constant_result


def test_it_marks_a_function_as_torch_does():
    def ours():
        pass

    def theirs():
        pass

    torch.compiler.assume_constant_result(theirs)
    assert vars(assume_constant_result(ours)) == vars(theirs) != {}


def test_the_kernels_do_not_import_the_compiler():
    code = "import sys, voco_kernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
