"""What is refused before it is paid for, and what is no picture; always by one error."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

from tests.voco_model.pictures.files import encoded, noise, opened
from voco_model.pictures import PictureError, PictureLimits, decode, size_of
from voco_model.pictures.limits import processed_pixels

DATA = encoded(noise())


def clip(**options) -> LlavaImageProcessorPil:
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return LlavaImageProcessorPil(**(sizes | options))


def blank(width: int, height: int) -> bytes:
    return encoded(Image.new("1", (width, height)))


SIZES = ((300, 200), (10, 100), (1, 201), (1, 190), (190, 1), (60_000, 400))
BLANK = {size: blank(*size) for size in SIZES}


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded before it was refused")

    monkeypatch.setattr(Image.core, "new", refuse)


@pytest.mark.parametrize(
    "size, limits, processor, message",
    [
        ((300, 200), {"max_pixels": 50_000}, None, "of at most 50,000 pixels, got .* of 300 x 200"),
        ((10, 100), {"max_aspect_ratio": 9.5}, None, "at most 1 to 9.5, got .* of 10 x 100"),
        ((1, 201), {}, None, "at most 1 to 200, got .* of 1 x 201"),
        (
            (1, 190),
            {},
            clip(),
            "resizes to at most 16,777,216 pixels, .* 190, which makes 21,450,240",
        ),
        ((190, 1), {}, clip(), "raise max_resized_pixels of PictureLimits"),
        ((60_000, 400), {}, clip(do_pad=True), "pads to at most .* which makes 3,600,000,000"),
    ],
)
def test_sizes_beyond_a_limit(no_decoding, size, limits, processor, message):
    data = BLANK[size]
    for read in (decode, size_of):
        for given in (data, opened(data)):
            with pytest.raises(PictureError, match=message):
                read(given, limits=PictureLimits(**limits), processor=processor)


def test_a_limit_may_be_none():
    limits = PictureLimits(max_aspect_ratio=None, max_resized_pixels=None)
    assert decode(blank(1, 400), limits=limits, processor=clip()).size == (1, 400)
    limits = PictureLimits(max_bytes=None, max_pixels=None)
    assert decode(io.BytesIO(DATA), limits=limits).size == (44, 30)


def test_bytes_beyond_a_limit(tmp_path):
    limits = PictureLimits(max_bytes=1000)
    (tmp_path / "photo.png").write_bytes(DATA)
    for given in (
        DATA,
        tmp_path / "photo.png",
        io.BytesIO(DATA),
        {"bytes": DATA, "path": "photo.png"},
    ):
        with pytest.raises(PictureError, match="of at most 1,000 bytes, got .*; raise max_bytes"):
            decode(given, limits=limits)


@pytest.mark.parametrize("value", [0, -1, True, "many"])
def test_limits_are_positive_numbers(value):
    with pytest.raises(ValueError, match="expected max_pixels as an int > 0 or None, got"):
        PictureLimits(max_pixels=value)


@pytest.mark.parametrize("height, width", [(30, 44), (44, 30), (1, 40), (333, 100)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_pad": True},
        {"do_resize": False},
        {"size": {"height": 20, "width": 30}},
        {"size": {"shortest_edge": 20, "longest_edge": 400}},
    ],
)
def test_what_a_processor_makes_is_known_before(monkeypatch, height, width, options):
    processor = clip(**options)
    largest = [0]
    padded = [height * width]
    resize, pad = type(processor).resize, type(processor).pad_to_square

    def resized(self, image, *args, **kwargs):
        made = resize(self, image, *args, **kwargs)
        largest[0] = max(largest[0], made.shape[-1] * made.shape[-2])
        return made

    def square(self, image, *args, **kwargs):
        made = pad(self, image, *args, **kwargs)
        padded[0] = made.shape[-1] * made.shape[-2]
        return made

    monkeypatch.setattr(type(processor), "resize", resized)
    monkeypatch.setattr(type(processor), "pad_to_square", square)
    processor(images=[noise(height, width)], return_tensors="pt")
    assert processed_pixels(processor, height, width) == (padded[0], largest[0])


def test_tiles_do_not_grow_with_the_picture():
    processor = LlavaNextImageProcessorPil()
    assert processed_pixels(processor, 1, 5000) == (5000, 672 * 672)


def test_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="Pillow's own limit.*raise PIL.Image.MAX_IMAGE_PIXELS"):
        decode(DATA, limits=PictureLimits(max_pixels=None))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match="DecompressionBombWarning"):
            decode(DATA)


def closed(image: Image.Image) -> Image.Image:
    image.close()
    return image


def refused(tmp_path) -> list:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(DATA[: len(DATA) // 2])
    os.mkfifo(tmp_path / "pipe")
    unreadable = "reading .* as an image failed: "
    return [
        (None, "got None"),
        (7, "got int"),
        ([noise()], "got list"),
        ({"label": 3}, r"expected a mapping with bytes, .*, got one with \['label'\]"),
        ("nowhere.png", "expected an image, got nowhere.png, which was not found"),
        ("a\0b", "which was not found"),
        ("x.y" * 2000, "which was not found"),
        ("", "expected an image, got"),
        (tmp_path, "which is not a regular file"),
        (tmp_path / "pipe", "which is not a regular file"),
        (tmp_path / "empty.png", "empty.png, which is empty"),
        (tmp_path / "text.png", "text.png, in no format that Pillow can read"),
        (tmp_path / "cut.png", "reading .*cut.png as an image failed: OSError"),
        (b"", "got 0 bytes, which is empty"),
        (b"abc", "got 3 bytes, in no format"),
        ("data:image/png,abc", "expected a data URI in base64"),
        ("data:image/png;base64,@@", "expected base64, got a data URI that isn't"),
        (io.StringIO("text"), "expected a file opened in binary mode"),
        (closed(noise()), unreadable + ".*Operation on closed image"),
        (closed(opened(DATA)), unreadable + ".*Operation on closed image"),
    ]


def test_what_is_no_picture_is_named(tmp_path):
    for given, message in refused(tmp_path):
        with pytest.raises(PictureError, match=message):
            decode(given)


def test_arrays_have_limits_too():
    with pytest.raises(PictureError, match="of at most 100 pixels, got an array of 20 x 20"):
        decode(np.zeros((20, 20), np.uint8), limits=PictureLimits(max_pixels=100))


@pytest.mark.parametrize("limits", [None, {"max_bytes": 5}])
def test_limits_that_are_none_are_not_the_pictures_fault(limits):
    with pytest.raises(TypeError, match="expected limits as PictureLimits"):
        decode(Image.new("RGB", (4, 4)), limits=limits)


def test_limits_are_whole_numbers():
    with pytest.raises(ValueError, match="expected max_bytes as an int > 0 or None, got 1000000.0"):
        PictureLimits(max_bytes=1e6)
    assert PictureLimits(max_pixels=np.int64(5), max_aspect_ratio=2.5).max_pixels == 5
