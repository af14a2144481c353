"""Images in Pillow's modes to 8-bit RGB: orientation, transparency, 16-bit values."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from voco_model.pictures.arrays import rgb_of_array
from voco_model.pictures.errors import PictureError
from voco_model.pictures.ground import Ground, composite

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# Keywords of the PNG text chunks in which Pillow looks for an orientation.
_PNG_EXIF_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
# TIFF tags, and a value.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def is_decoded(image: Image.Image) -> bool:
    """Whether ``rgb_of`` would change nothing, because this is plain RGB in memory without metadata."""
    plain = type(image) is Image.Image and image.mode == "RGB" and not image.info
    return plain and not image.getexif()


def rgb_of(image: Image.Image, ground: Ground) -> Image.Image:
    """A new image, RGB, upright, without metadata; ``image`` keeps its mode and palette.

    Raises:
        PictureError: 32-bit or float values of unknown range.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _colours(image, ground)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # so that nothing turns it or makes it transparent again
    return rgb


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of ``rgb_of(image)``, from the header alone."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns it, and reports the turned size before loading
        return height, width
    if image.format == "PNG" and "exif" not in image.info and not _png_has_late_exif(image):
        return height, width
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; whatever format holds it."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, struct.error, KeyError, TypeError, ValueError, EOFError):
        return 1  # damaged EXIF data: viewers show the image as stored
    return value if value in _TURNS else 1


def _png_has_late_exif(image: Image.Image) -> bool:
    """Whether a PNG may have its orientation after the pixels, which Pillow reads after the header.

    Pillow's ``getexif`` would decode the whole image to find out; this reads chunk headers only.
    """
    file = getattr(image, "fp", None)
    if file is None:  # loaded, so Pillow has read everything
        return True
    before = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            end = file.tell() + length + 4
            if kind == b"IEND":
                return False
            if pixels and kind == b"eXIf":
                return True
            if pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
                if file.read(min(length, 80)).split(b"\0")[0] in _PNG_EXIF_TEXTS:
                    return True
            pixels |= kind == b"IDAT"
            file.seek(end)
        return False
    finally:
        file.seek(before)


def _colours(image: Image.Image, ground: Ground) -> Image.Image:
    # Pillow would clip 16-bit values to 8 bits. A 16-bit PGM is opened as "I", in old versions a PNG
    # too.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _sixteen_bits(image, ground)
    if image.mode in ("I", "F"):
        return rgb_of_array(np.asarray(image), ground, f"an image of mode {image.mode}")
    if not _has_transparency(image):
        return image.convert("RGB")
    clear = image.info.get("transparency")
    if image.mode == "RGB" and not isinstance(clear, tuple):
        return image.convert("RGB")  # convert("RGB") of a grey image leaves a grey value there
    if image.mode == "RGB" and max(clear) > 255:
        # Pillow keeps the high bytes of 48-bit colors, but all of the transparent one.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return composite(image, ground)


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "RGB"):
        return "transparency" in image.info
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P") and image.has_transparency_data


def _sixteen_bits(image: Image.Image, ground: Ground) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(
            f"expected values from 0 to 65535 in a 16-bit image, got {values.min()} to {values.max()}"
        )
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    white = (1 << bits) - 1 if 8 < bits < 16 else 65535  # a TIFF may have 12 bits
    table = ((np.arange(65536).clip(max=white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        table = 255 - table
    grey = Image.fromarray(table[values])
    clear = image.info.get("transparency")
    if clear is None:
        return grey.convert("RGB")
    grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return composite(grey, ground)
