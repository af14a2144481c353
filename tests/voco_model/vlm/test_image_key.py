"""Keys of images and fingerprints of models: what changes them, and what doesn't."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import voco_model
from tests.voco_model import tiny
from voco_model import PictureError, PictureLimits, fingerprint, image_key
from voco_model.pictures import decode
from voco_model.vlm.image_key import pixel_digest


@pytest.fixture
def setting():
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with voco_model.enable(model, processor, num_voco=2):
        yield model, processor


def picture(width=40, height=30, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_a_key_is_the_pixels_however_they_come(setting, tmp_path):
    model, processor = setting
    image = picture()
    key = image_key(image, model=model, processor=processor)
    assert re.fullmatch("[0-9a-f]{64}", key)
    for name in ("a.png", "b.bmp", "c.tiff"):
        image.save(tmp_path / name)
        for given in (tmp_path / name, str(tmp_path / name), Image.open(tmp_path / name)):
            assert image_key(given, model=model, processor=processor) == key
    pixels = np.asarray(image)
    for given in (
        (tmp_path / "a.png").read_bytes(),
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        pixels.astype(np.float32) / 255,
        pixels.astype(np.uint16) * 257,
        image.convert("RGBA"),
        decode(tmp_path / "a.png"),
    ):
        assert image_key(given, model=model, processor=processor) == key
        assert pixel_digest(given) == pixel_digest(image)


def test_a_key_says_how_its_pixels_were_made(setting, monkeypatch):
    model, processor = setting
    key = image_key(picture(), model=model, processor=processor)
    monkeypatch.setattr(sys.modules["voco_model.vlm.image_key"], "_PIXELS", "rgb8 v1")
    assert image_key(picture(), model=model, processor=processor) != key


def test_a_ground_is_in_the_key_where_it_shows(setting):
    model, processor = setting
    drawing = picture().convert("RGBA")
    keys = {
        image_key(image, model=model, processor=processor, ground=ground)
        for image in (picture(), drawing)
        for ground in (None, (255, 255, 255), (0, 0, 0))
    }
    assert len(keys) == 1
    drawing.putalpha(100)
    white, black = (
        image_key(drawing, model=model, processor=processor, ground=ground)
        for ground in (None, (0, 0, 0))
    )
    assert white != black
    on_white = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)
    assert white == image_key(on_white.convert("RGB"), model=model, processor=processor)


def test_a_key_is_bounded_in_cost(setting):
    model, processor = setting
    with pytest.raises(PictureError, match="of at most 100 pixels"):
        image_key(picture(), model=model, processor=processor, limits=PictureLimits(max_pixels=100))


def test_whatever_would_give_another_entry_gives_another_key(setting):
    model, processor = setting
    image = picture()
    changed = image.copy()
    changed.putpixel((7, 7), (1, 2, 3))
    flat = np.asarray(image)
    palette = image.convert("P")
    other_palette = palette.copy()
    other_palette.putpalette([255 - value for value in palette.getpalette()])
    see_through = palette.copy()
    see_through.info["transparency"] = palette.getpixel((0, 0))
    turned = image.copy()
    turned.getexif()[0x0112] = 3
    images = {
        "itself": image,
        "one pixel": changed,
        "the same bytes in another shape": Image.frombytes("RGB", (30, 40), image.tobytes()),
        "grey": image.convert("L"),
        "a palette": palette,
        "another palette": other_palette,
        "a palette with a transparent colour": see_through,
        "turned": turned,
        "turned on its side": flat.transpose(1, 0, 2),
    }
    keys = {
        name: image_key(each, model=model, processor=processor) for name, each in images.items()
    }
    assert len(set(keys.values())) == len(images)


def test_model_processor_and_number_of_tokens_are_in_the_key(setting):
    model, processor = setting
    image = picture()
    keys = [image_key(image, model=model, processor=processor)]
    keys.append(image_key(image, model=model, processor=processor, num_voco=3))
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    keys.append(image_key(image, model=model, processor=processor))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] += 1
    keys.append(image_key(image, model=model, processor=processor))
    assert len(set(keys)) == 4


def test_tenants_have_keys_of_their_own(setting):
    model, processor = setting
    salts = (None, "a", "b", b"b", "ab")
    keys = [image_key(picture(), model=model, processor=processor, salt=salt) for salt in salts]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 4
    with pytest.raises(ValueError, match="expected a salt of at least one byte"):
        image_key(picture(), model=model, processor=processor, salt="")
    with pytest.raises(PictureError, match="expected an image .*, got int"):
        image_key(3, model=model, processor=processor)


def test_a_fingerprint_is_of_the_weights_not_of_the_name(tmp_path):
    model = tiny.tiny_llava("llava")
    name = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", name)
    model.save_pretrained(tmp_path / "elsewhere")
    again = type(model).from_pretrained(tmp_path / "elsewhere")
    assert fingerprint(again) == name
    assert fingerprint(again.to(torch.bfloat16)) != name
    again.config.vision_feature_layer = -1
    assert fingerprint(again) != fingerprint(again.float()) != name


@pytest.mark.parametrize("change", ["in place", "another tensor", "load_state_dict", "step"])
def test_a_fingerprint_follows_the_weights(change):
    model = tiny.tiny_llava("llava")
    before = fingerprint(model)
    assert fingerprint(model) == before
    weight = model.lm_head.weight
    if change == "in place":
        with torch.no_grad():
            weight[0, 0] += 1
    elif change == "another tensor":
        model.lm_head.weight = torch.nn.Parameter(weight.detach() + 1)
    elif change == "load_state_dict":
        model.load_state_dict(tiny.tiny_llava("llava").float().state_dict())
        assert fingerprint(model) == before
        model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    else:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    assert fingerprint(model) != before


def test_a_tensor_at_the_address_of_the_one_before_is_another_one():
    model = tiny.tiny_llava("llava")
    seen = {fingerprint(model)}
    for number in range(10):
        shape = model.lm_head.weight.shape
        model.lm_head.weight = None  # its memory is free for the next
        model.lm_head.weight = torch.nn.Parameter(torch.full(shape, float(number)))
        seen.add(fingerprint(model))
    assert len(seen) == 11


def test_a_fused_step_that_torch_does_not_count_is_seen_in_the_numbers():
    model = tiny.tiny_llava("llava")
    before = fingerprint(model)
    weight = model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    assert fingerprint(model) != before


def test_what_torch_does_not_count_is_told_by_the_caller():
    model = tiny.tiny_llava("llava")
    before = fingerprint(model)
    model.lm_head.weight.data[0, 1] += 1
    assert fingerprint(model) == before  # one number in many, as its docstring says
    assert fingerprint(model, refresh=True) != before


def test_a_fingerprint_wants_weights():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    model.config = tiny.tiny_llava("llava").config
    with pytest.raises(ValueError, match="expected loaded weights, got weight on the meta"):
        fingerprint(model)


def test_numpys_integers_are_integers(setting):
    model, processor = setting
    keys = {
        image_key(picture(), model=model, processor=processor, num_voco=number)
        for number in (2, np.int64(2), None)
    }
    assert len(keys) == 1
    with pytest.raises(ValueError, match="expected an int num_voco >= 1, got 2.0"):
        image_key(picture(), model=model, processor=processor, num_voco=2.0)
    engine = voco_model.TwoPassEngine(model, processor, num_voco=np.int64(2))
    assert engine.answer(picture(), "What?", max_new_tokens=1).finish_reason == "length"
