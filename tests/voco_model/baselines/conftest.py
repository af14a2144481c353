"""A model in float64, in which two routes differ by little, and what the methods are applied with."""

from __future__ import annotations

import pytest

from tests.voco_model import tiny


@pytest.fixture(scope="module")
def shared_double(kind):
    return tiny.tiny_llava(kind).double()


@pytest.fixture
def double(shared_double):
    yield shared_double.eval()
    assert shared_double.config.text_config._attn_implementation == "sdpa", "a test forgot undo()"


@pytest.fixture(scope="module")
def shared_llava():
    return tiny.tiny_llava("llava").double()


@pytest.fixture
def llava(shared_llava):
    """LLaVA-1.5, which alone some methods take."""
    yield shared_llava.eval()
    assert not shared_llava.model._forward_pre_hooks, "a test forgot undo()"


@pytest.fixture
def llava_processor():
    return tiny.tiny_processor("llava")
