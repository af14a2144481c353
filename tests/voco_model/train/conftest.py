"""A tiny checkpoint and data on disk, made once for a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.voco_model import instruction


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def checkpoint(folder) -> Path:
    return instruction.write_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def data(folder) -> Path:
    return instruction.write_data(folder / "data")
