"""Training, two passes, engine, explain and baselines see the same pixels of one picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor, LlavaNextImageProcessor

import voco_model
from tests.voco_model import tiny
from tests.voco_model.pictures.files import encoded, noise, oriented
from voco_model import baselines
from voco_model.data.encode import Encoder
from voco_model.data.faults import DataError
from voco_model.data.samples import sample_of
from voco_model.engine.first_pass import prepare_pixels
from voco_model.evaluate.requests import image_of
from voco_model.explain.compute import _prepare
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.pictures import decode
from voco_model.vlm.attach import name_tokens

TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A man."}]
BLACK = (0, 0, 0)


@pytest.fixture
def setting():
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with voco_model.enable(model, processor, num_voco=2):
        yield model, processor


@pytest.fixture
def photo(tmp_path):
    """A PNG that is turned, and transparent on its left half: as a file, and as it is shown."""
    stored = noise(40, 64).convert("RGBA")
    alpha = np.full((40, 64), 255, np.uint8)
    alpha[:20] = 0
    stored.putalpha(Image.fromarray(alpha))
    (tmp_path / "photo.png").write_bytes(encoded(stored, exif=oriented(6)))

    def shown(ground) -> Image.Image:
        pixels = np.asarray(noise(40, 64)).copy()
        pixels[:20] = ground
        return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1)))

    return tmp_path / "photo.png", shown


def trained_on(processor, path, **options) -> torch.Tensor:
    sample = sample_of({"image": path.name, "conversations": TURNS}, "x", path.parent)
    return Encoder(processor, "vicuna", 4096, **options).encode(sample, 2).pixel_values


@pytest.mark.parametrize("ground", [(255, 255, 255), BLACK])
def test_all_readers_agree(setting, photo, ground):
    model, processor = setting
    path, shown = photo
    want = processor.image_processor(images=[shown(ground)], return_tensors="pt")["pixel_values"]
    if ground == BLACK:
        model.config.voco_ground = list(BLACK)  # as training on another ground leaves it
    seen = {
        "training": trained_on(processor, path, ground=ground),
        "engine": prepare_pixels(processor, path, ground=ground).tiles,
        "explain": _prepare(model, path, "Who?", processor)[1]["pixel_values"],
    }
    for name, pixels in seen.items():
        assert torch.equal(pixels, want), name
    (entry,) = voco_model.compress(model, path, processor=processor)
    (expected,) = voco_model.compress(model, shown(ground), processor=processor)
    assert torch.equal(entry.kv, expected.kv)
    key = voco_model.image_key(path, model=model, processor=processor)
    assert key == voco_model.image_key(shown(ground), model=model, processor=processor)


def test_baselines_and_evaluation_agree(photo):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    path, shown = photo
    want = processor.image_processor(images=[shown((255,) * 3)], return_tensors="pt")
    with baselines.apply("full", model, processor) as method:
        for given in (path, Image.open(path), image_of([Image.open(path)], "refuse", "question 1")):
            inputs = method.inputs([given], ["Who?"])
            assert torch.equal(inputs["pixel_values"], want["pixel_values"])
        with pytest.raises(
            voco_model.PictureError, match="image 2 of 2: .* nowhere.png, which was not found"
        ):
            method.inputs([path, "nowhere.png"], ["Who?", "What?"])


def test_an_image_of_a_question_that_cannot_be_read_names_it():
    data = encoded(noise(200, 200))
    cut = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(voco_model.PictureError, match="OSError: .*, in question 7 of gqa"):
        image_of([cut], "refuse", "question 7 of gqa")


def test_training_counts_what_is_beyond_the_limits(tmp_path):
    processor = tiny.tiny_processor("llava")
    name_tokens(processor.tokenizer)
    Image.new("RGB", (2, 500)).save(tmp_path / "thin.png")
    sample = sample_of({"image": "thin.png", "conversations": TURNS}, "a.json:3", tmp_path)
    encoder = Encoder(processor, "vicuna", 4096)
    for look in (encoder.length, encoder.encode):
        with pytest.raises(
            DataError, match="sides of at most 1 to 200, got .*thin.png of 2 x 500"
        ) as e:
            look(sample, 2)
        assert (e.value.fault.kind, e.value.fault.where) == ("broken_image", "a.json:3")
    wide = voco_model.PictureLimits(max_aspect_ratio=None)
    assert Encoder(processor, "vicuna", 4096, limits=wide).length(sample, 2) > 0


def test_compress_takes_limits_and_names_what_it_refuses(setting):
    model, processor = setting
    thin = Image.new("RGB", (1, 300))
    with pytest.raises(voco_model.PictureError, match="image 2 of 3: .* at most 1 to 200"):
        voco_model.compress(model, [noise(), thin, noise()], processor=processor)
    limits = voco_model.PictureLimits(max_aspect_ratio=None)
    store = MemoryStore(1 << 20)
    assert (
        len(voco_model.compress(model, thin, processor=processor, limits=limits, store=store)) == 1
    )


class Replacing(MemoryStore):
    """While it is asked for an entry, the picture's file is written anew."""

    def __init__(self, path) -> None:
        super().__init__(1 << 20)
        self.path = path

    def get(self, key):
        noise(seed=1).save(self.path)
        return super().get(key)

    def get_many(self, keys):
        noise(seed=1).save(self.path)
        return super().get_many(keys)


@pytest.mark.parametrize("way", ["compress", "engine"])
def test_a_file_that_is_replaced_leaves_no_wrong_entry(setting, tmp_path, way):
    model, processor = setting
    path = tmp_path / "photo.png"
    noise(seed=0).save(path)
    expected = voco_model.compress(model, noise(seed=0), processor=processor)[0]
    store = Replacing(path)
    if way == "compress":
        voco_model.compress(model, path, processor=processor, store=store)
    else:
        with voco_model.TwoPassEngine(model, processor, store, max_new_tokens=1) as engine:
            engine.answer(path, "Who?")
    key = voco_model.image_key(noise(seed=0), model=model, processor=processor)
    torch.testing.assert_close(MemoryStore.get(store, key).kv, expected.kv, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "next"])
def test_torchvisions_processors_get_the_same_pixels(tmp_path, kind):
    """It decodes paths by itself: BMP and TIFF not at all, 16 bits and turned files differently."""
    pytest.importorskip("torchvision")
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    by_torchvision = {"llava": LlavaImageProcessor, "next": LlavaNextImageProcessor}[kind]
    processor.image_processor = by_torchvision(**processor.image_processor.to_dict())
    ramp = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(64, 48).astype(np.uint16))
    files = {
        "photo.bmp": encoded(noise(64, 48), "BMP"),
        "scan.tiff": encoded(noise(64, 48), "TIFF"),
        "depth.png": encoded(ramp),
        "turned.jpg": encoded(noise(64, 48), "JPEG", exif=oriented(6)),
    }
    with voco_model.enable(model, processor, num_voco=2):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            shown = decode(data)
            want = prepare_pixels(processor, shown).tiles
            for given in (tmp_path / name, np.asarray(shown), Image.open(io.BytesIO(data))):
                assert torch.equal(prepare_pixels(processor, given).tiles, want), name
            entries = voco_model.compress(model, [tmp_path / name, shown], processor=processor)
            assert torch.equal(entries[0].kv, entries[1].kv), name
