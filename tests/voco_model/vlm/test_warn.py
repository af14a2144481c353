"""Warnings about models that run, but not as they were trained: each once per model."""

from __future__ import annotations

import warnings

import pytest

import voco_model
from tests.voco_model import tiny
from voco_model import baselines
from voco_model.vlm.attach import attach
from voco_model.vlm.warn import VoCoWarning


@pytest.fixture
def fresh(kind):
    """A model and processor that no other test has been warned about."""
    return tiny.tiny_llava(kind), tiny.tiny_processor(kind)


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", VoCoWarning)
        yield


def trained(model, num_voco: int):
    model.config.num_voco, model.config.voco_token_id = num_voco, tiny.VOCO
    return model


def test_an_untrained_model_warns_once(fresh):
    model, processor = fresh
    with pytest.warns(VoCoWarning, match="never trained with VoCo tokens") as caught:
        voco_model.enable(model, processor).undo()
        voco_model.enable(model, processor, num_voco=2).undo()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_refused_call_does_not_warn(fresh, no_warning):
    model, processor = fresh
    with pytest.raises(ValueError, match="num_voco"):
        voco_model.enable(model, processor, num_voco=0)


def test_a_model_that_is_to_be_trained_does_not_warn(fresh, no_warning):
    with attach(*fresh, num_voco=2) as handle:
        assert handle.num_voco == 2


def test_an_upper_bound_warns(fresh):
    model, processor = fresh
    trained(model, 2).config.voco_baseline = {"name": "full", "num_voco": 2, "distinct": None}
    with pytest.warns(VoCoWarning, match="without their mask"), voco_model.enable(model, processor):
        pass


def test_another_number_than_the_checkpoints_warns(fresh):
    model, processor = fresh
    trained(model, 4)
    with pytest.warns(VoCoWarning, match="trained with num_voco=4 and is used with 1"):
        voco_model.enable(model, processor, num_voco=1).undo()
    assert model.config.num_voco == 4


@pytest.mark.parametrize("num_voco", [None, 4])
def test_the_checkpoints_own_number_does_not_warn(fresh, num_voco, no_warning):
    model, processor = fresh
    with voco_model.enable(trained(model, 4), processor, num_voco):
        voco_model.compress(model, tiny.picture(0), processor=processor, num_voco=num_voco)


def test_compress_warns_of_another_number(fresh):
    model, processor = fresh
    with attach(trained(model, 4), processor):
        with pytest.warns(VoCoWarning, match="num_voco=3 tokens by a model with 4") as caught:
            for _ in range(2):
                voco_model.compress(model, tiny.picture(0), processor=processor, num_voco=3)
    assert len(caught) == 1


def test_an_image_without_voco_tokens_warns_once(fresh):
    model, processor = fresh
    plain = processor(
        images=[tiny.picture(0)], text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    with attach(trained(model, 2), processor):
        with pytest.warns(VoCoWarning, match=r"\(row 0\) has an image and no VoCo token") as caught:
            for _ in range(2):
                model.generate(**plain, max_new_tokens=2)
    assert len(caught) == 1


def test_prompts_without_images_or_with_voco_tokens_do_not_warn(fresh, no_warning):
    model, processor = fresh
    with attach(trained(model, 2), processor):
        inputs, _ = tiny.batch_of(model, [(2, 4), (0, 3)])
        model.generate(**inputs, max_new_tokens=2)


def test_baselines_load_warns_for_voco_alone(tmp_path):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(VoCoWarning, match="never trained"):
        baselines.load(tmp_path, "voco", num_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VoCoWarning)
        baselines.load(tmp_path, "untrained", num_tokens=2)  # what it measures
        baselines.load(tmp_path, "full")
