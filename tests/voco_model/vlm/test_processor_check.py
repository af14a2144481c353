"""Processors that don't fit their model, and that what the error says mends them."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.processor_check import check_processor

RIGHT = {
    "patch_size": 8,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("patch_size", 16),
        ("patch_size", None),
        ("num_additional_image_tokens", 0),
        ("vision_feature_select_strategy", "full"),
    ],
)
def test_counts_of_image_tokens(model, kind, name, wrong):
    processor = tiny.tiny_processor(kind)
    setattr(processor, name, wrong)
    template = processor.chat_template
    with pytest.raises(
        ValueError, match=f"with {name} {RIGHT[name]!r}, got {wrong!r}; set"
    ) as caught:
        voco_model.enable(model, processor)
    assert processor.chat_template == template and not hasattr(model.config, "num_voco")
    advice = str(caught.value).split("; set ")[1].split(", and")[0]
    exec(advice, {"processor": processor})
    with voco_model.enable(model, processor):
        voco_model.compress(model, tiny.picture(1), processor=processor)


def test_sizes_of_pictures(model, kind):
    processor = tiny.tiny_processor(kind)
    images = processor.image_processor
    images.size = images.crop_size = {"height": 24, "width": 24}
    with pytest.raises(ValueError, match="pictures of 32 x 32 pixels.*got 24 x 24"):
        voco_model.enable(model, processor)
    images.size = images.crop_size = {"height": 32, "width": 32}
    with voco_model.enable(model, processor):
        voco_model.compress(model, tiny.picture(1), processor=processor)


def test_a_picture_that_is_not_cropped(model, kind):
    if kind == "next":
        pytest.skip("LLaVA-NeXT cuts every picture into squares")
    processor = tiny.tiny_processor(kind)
    processor.image_processor.do_center_crop = False
    with pytest.raises(ValueError, match="got 32 x 64"):
        voco_model.enable(model, processor)


def test_grids():
    model, processor = tiny.tiny_llava("next"), tiny.tiny_processor("next")
    processor.image_processor.image_grid_pinpoints = [[32, 64]]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints .*got \[\[32, 64\]\]"):
        voco_model.enable(model, processor)


def test_ends_of_answers(model, processor):
    with pytest.raises(ValueError, match=r"the token <\|im_end\|>.*'chatml'.*reads 10 tokens"):
        voco_model.enable(model, processor, prompt="chatml")
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token, which ends answers in style 'mistral'"):
        voco_model.enable(model, processor, prompt="mistral")
    check = tiny.tiny_processor("llava")
    check.tokenizer.add_tokens(["<|im_end|>"])
    check_processor(check, tiny.tiny_llava("llava").config, "chatml")


def test_a_saved_config_is_enough(kind, tmp_path):
    tiny.tiny_llava(kind).config.save_pretrained(tmp_path)
    config, processor = AutoConfig.from_pretrained(tmp_path), tiny.tiny_processor(kind)
    check_processor(processor, config, "vicuna")
    processor.num_additional_image_tokens = 2
    with pytest.raises(ValueError, match="num_additional_image_tokens 1, got 2"):
        check_processor(processor, config, "vicuna")
