"""Processors that know <VoCo>, and what ``datasets`` keeps, in a folder of the test's own."""

from __future__ import annotations

import pytest

from tests.voco_model import tiny
from voco_model.vlm.attach import name_tokens


@pytest.fixture
def processor(kind):
    return named(kind)


@pytest.fixture
def llava():
    return named("llava")


def named(kind: str):
    processor = tiny.tiny_processor(kind)
    name_tokens(processor.tokenizer)
    return processor


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After each pass over a shuffled parquet file it sleeps, for threads that might still end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
