"""``load``: what it returns, and what it says of paths that hold no checkpoint."""

from __future__ import annotations

import pytest

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.load import load_processor, read_config
from voco_model.vlm.warn import VoCoWarning


@pytest.fixture
def saved(kind, tmp_path):
    """A run's output folder, with a checkpoint in ``model``."""
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    with voco_model.enable(model, processor, num_voco=2):
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_pair_with_a_handle(saved):
    loaded = voco_model.load(saved / "model")
    model, processor = loaded
    assert (loaded.model, loaded.processor) == (model, processor)
    assert loaded.handle.model is model and not model.training
    loaded.handle.undo()
    assert model.config.text_config._attn_implementation == "sdpa"
    with voco_model.enable(model, processor, isolated=True):
        assert model.config.voco_isolated


@pytest.mark.parametrize("isolated", [None, True])
def test_isolated_is_passed_on(saved, isolated):
    model, _ = voco_model.load(saved / "model", isolated=isolated)
    assert model.config.voco_isolated is bool(isolated)


def test_a_plain_llava_warns(tmp_path):
    tiny.tiny_llava("llava").save_pretrained(tmp_path)
    tiny.tiny_processor("llava").save_pretrained(tmp_path)
    with pytest.warns(VoCoWarning, match="never trained with VoCo tokens"):
        voco_model.load(tmp_path)


@pytest.mark.parametrize("read", [voco_model.load, read_config, load_processor])
def test_paths_without_a_checkpoint_are_named(saved, read, tmp_path):
    def refused(path, message):
        with pytest.raises(FileNotFoundError, match=message):
            read(path)

    refused(
        saved / "modle", "expected a checkpoint's folder or a hub name, got .*modle, .* not found"
    )
    refused("runs/voco/model", "got runs/voco/model, which was not found; check the path")
    refused("./model", "got ./model, which was not found")
    refused(saved, "config.json, got .* without one; did you mean .*/model?")
    refused(saved / "model" / "config.json", "got the file .*config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "got .*empty without one; check the path")
