"""One tiny model of each kind per test module; each test enables and undoes on its own."""

from __future__ import annotations

import pytest

import voco_model
from tests.voco_model import tiny


def pytest_configure(config: pytest.Config) -> None:
    # The tiny models are untrained on purpose; tests of the warnings see them by pytest.warns.
    for message in (
        "this model was ",
        "a prompt .* has an image and no VoCo token",
        "images are compr",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_model(kind):
    return tiny.tiny_llava(kind)


@pytest.fixture
def model(shared_model):
    """The module's model, in eval mode and as it was built: a test that leaves it enabled fails
    here."""
    shared_model.eval()
    shared_model.zero_grad()
    yield shared_model
    shared_model.gradient_checkpointing_disable()
    assert shared_model.config.text_config._attn_implementation == "sdpa", "a test forgot undo()"
    assert not shared_model.model._forward_pre_hooks, "a test forgot undo()"


@pytest.fixture
def enabled(model):
    """The model with VoCo attention, 2 VoCo tokens an image, no processor."""
    with voco_model.enable(model, num_voco=2, voco_token_id=tiny.VOCO):
        yield model


@pytest.fixture
def processor(kind):
    return tiny.tiny_processor(kind)
