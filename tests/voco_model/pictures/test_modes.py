"""Colours: every mode of Pillow, 16 bits, transparency, arrays."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.voco_model.pictures.files import encoded, noise, opened, png_chunk
from voco_model.pictures import PictureError, decode, ground_of

ORANGE = (200, 100, 50)
PLAIN = Image.new("RGB", (4, 4), ORANGE)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
# round(value / 257), written down a second time
EIGHT = np.floor(RAMP / 257 + 0.5).astype(np.uint8)


def colour(given, at=(0, 0), **options) -> tuple[int, ...]:
    return decode(given, **options).getpixel(at)


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(PLAIN, *profiles, outputMode="LAB")


@pytest.mark.parametrize(
    "image, tolerance",
    [
        (PLAIN.convert("RGBX"), 0),
        (PLAIN.convert("CMYK"), 0),
        (PLAIN.convert("HSV"), 1),
        (PLAIN.convert("YCbCr"), 1),
        (lab(), 1),
        (PLAIN.quantize(4), 0),
        (PLAIN.quantize(4).convert("PA"), 0),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_modes_keep_their_colours(image, tolerance):
    found = colour(image)
    assert max(abs(a - b) for a, b in zip(found, ORANGE, strict=True)) <= tolerance


def test_grey_and_black_and_white():
    assert colour(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert colour(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert colour(encoded(Image.new("1", (4, 4), 0))) == (0, 0, 0)


def test_a_transparent_grey_value_that_convert_has_left_is_no_colour():
    grey = Image.new("L", (4, 4), 77)
    grey.info["transparency"] = 77
    rgb = grey.convert("I;16").convert("I").convert("L").convert("RGB")
    rgb.info["transparency"] = 77
    assert colour(rgb) == (77, 77, 77)


def test_cmyk_of_adobe_is_not_inverted():
    data = encoded(Image.new("RGB", (16, 16), ORANGE).convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data and opened(data).mode == "CMYK"
    for given in (data, opened(data)):
        assert max(abs(a - b) for a, b in zip(colour(given), ORANGE, strict=True)) <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(kind):
    data = encoded(Image.fromarray(RAMP), kind)
    for given in (data, opened(data), RAMP, torch.from_numpy(RAMP), RAMP.astype(">u2")):
        found = np.asarray(decode(given))
        assert np.array_equal(found, np.dstack([EIGHT] * 3))


def test_sixteen_bits_in_other_orders():
    assert np.array_equal(np.asarray(decode(Image.fromarray(RAMP)))[..., 0], EIGHT)
    big = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(decode(big))[..., 0], EIGHT)


def test_a_tiff_whose_white_is_zero():
    data = bytearray(encoded(Image.fromarray(RAMP), "TIFF"))
    entry = data.index(struct.pack("<HHI", 262, 3, 1))
    data[entry + 8 : entry + 10] = struct.pack("<H", 0)
    assert np.array_equal(np.asarray(decode(bytes(data)))[..., 0], 255 - EIGHT)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_whose_white_is_unknown_are_refused(mode):
    image = Image.fromarray(RAMP).convert("I").convert(mode)
    with pytest.raises(PictureError, match=f"got an image of mode {mode}"):
        decode(image)


def test_floats_from_0_to_1_are_a_picture_as_an_image_too():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for given in (values, Image.fromarray(values), torch.from_numpy(values)):
        assert np.array_equal(np.asarray(decode(given))[..., 1], expected)


def palette(transparency) -> bytes:
    image = Image.new("P", (4, 4))
    image.putpalette([*ORANGE] * 256)
    return encoded(image, transparency=transparency)


def alpha(value: int) -> Image.Image:
    image = PLAIN.copy()
    image.putalpha(value)
    return image


def colour_png(bits: int, key: tuple[int, int, int]) -> bytes:
    """2 x 2 pixels of one colour, which tRNS declares transparent."""
    wide = struct.pack(">3H" if bits == 16 else ">3B", *key)
    rows = (b"\0" + wide * 2) * 2
    head = struct.pack(">IIBBBBB", 2, 2, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(*chunk)
        for chunk in (
            (b"IHDR", head),
            (b"tRNS", struct.pack(">3H", *key)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )


CLEAR = {
    "RGBA": alpha(0),
    "RGBa": alpha(0).convert("RGBa"),
    "LA": alpha(0).convert("LA"),
    "La": alpha(0).convert("LA").convert("La"),
    "PA": Image.new("PA", (4, 4)),
    "PNG": encoded(alpha(0)),
    "WebP": encoded(alpha(0), "WEBP", lossless=True, exact=True),
    "GIF": encoded(Image.new("P", (4, 4)), "GIF", transparency=0),
    "palette": palette(0),
    "palette in bytes": palette(bytes([0])),
    "palette with alpha": alpha(0).quantize(4),
    "grey": encoded(Image.new("L", (4, 4), 9), transparency=9),
    "black and white": encoded(Image.new("1", (4, 4), 0), transparency=0),
    "colour": colour_png(8, (1, 2, 3)),
    "48-bit colour": colour_png(16, (4000, 5000, 6000)),
    "16-bit grey": encoded(Image.fromarray(np.full((4, 4), 4000, np.uint16)), transparency=4000),
    "array": np.zeros((9, 9, 4), np.uint8),
    "floats": torch.zeros(4, 9, 9),
}


@pytest.mark.parametrize("form", CLEAR)
def test_transparent_pixels_show_the_ground(form):
    for given in (CLEAR[form], *([opened(CLEAR[form])] if isinstance(CLEAR[form], bytes) else [])):
        assert colour(given) == (255, 255, 255)
        assert colour(given, ground=(10, 20, 30)) == (10, 20, 30)


def test_half_transparent_pixels_mix():
    assert colour(alpha(128)) == colour(np.asarray(alpha(128).resize((9, 9))))
    for channel, value in zip(ORANGE, colour(alpha(128)), strict=True):
        assert abs(value - (channel * 128 + 255 * 127) / 255) <= 1
    for channel, value in zip(ORANGE, colour(palette(bytes([128]))), strict=True):
        assert abs(value - (channel * 128 + 255 * 127) / 255) <= 1


def test_what_is_given_stays_as_it_was():
    image = opened(palette(0))
    before = image.tobytes(), image.im.getpalettemode(), dict(image.info)
    decode(image)
    assert (image.tobytes(), image.im.getpalettemode(), image.info) == before
    turned = noise()
    turned.getexif()[0x0112] = 6
    decode(turned)
    assert turned.getexif()[0x0112] == 6 and turned.size == (44, 30)


@pytest.mark.parametrize("ground", [(0, 0), (0, 0, 256), "white", 3, (0.5, 0, 0), (True, 0, 0)])
def test_a_ground_is_a_colour(ground):
    with pytest.raises(ValueError, match="expected ground as three numbers from 0 to 255"):
        decode(PLAIN, ground=ground)


def test_a_model_remembers_its_ground():
    class Config:
        voco_ground = [0, 0, 0]

    assert ground_of(Config()) == (0, 0, 0)
    assert ground_of(Config(), (1, 2, 3)) == (1, 2, 3)
    assert ground_of(object()) == (255, 255, 255)


def test_arrays():
    flags = np.eye(8, dtype=bool)
    assert np.array_equal(np.asarray(decode(flags))[..., 2], np.eye(8, dtype=np.uint8) * 255)
    pixels = np.asarray(noise(8, 9))
    for given in (pixels[..., :1], pixels[..., :1].transpose(2, 0, 1), pixels[..., 0]):
        assert np.array_equal(decode(given), np.dstack([pixels[..., 0]] * 3))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 8, 8, 3)), "a batch; pass its images one by one"),
        (np.zeros((8, 8, 2)), "expected 1, 3 or 4 channels, first or last"),
        (np.zeros((3, 8, 3)), "where the channels are"),
        (np.zeros(8), r"expected an image of shape \[H, W\]"),
        (np.zeros((8, 8, 3), np.int64), "got an array of int64, whose range is unknown; if"),
        (np.zeros((8, 8, 3), np.int8), "of int8"),
        (np.zeros((8, 8), complex), "of complex128"),
        (np.full((8, 8), np.nan), "with NaN or infinity"),
        (np.full((8, 8), np.inf), "with NaN or infinity"),
        (np.linspace(-2.1, 2.6, 64).reshape(8, 8), "not a processor's normalized output"),
        (np.full((8, 8), 1.001), "if 255 is white, pass it as uint8"),
        (torch.full((3, 8, 8), 255.0), "got a tensor with 255 to 255"),
        (np.zeros((0, 8), np.uint8), "expected an image of at least one pixel"),
        (torch.zeros(3, 8, 8, device="meta"), "reading a tensor as an image failed"),
    ],
)
def test_arrays_that_do_not_say_what_they_are(array, message):
    with pytest.raises(PictureError, match=message):
        decode(array)
