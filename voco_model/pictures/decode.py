"""``decode``: the pixels of an image given in any form."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from voco_model.pictures.arrays import channels_last, is_array, rgb_of_array
from voco_model.pictures.errors import PictureError, reading
from voco_model.pictures.ground import WHITE, Ground, check_ground
from voco_model.pictures.limits import PictureLimits
from voco_model.pictures.modes import is_decoded, rgb_of, upright_size
from voco_model.pictures.sources import check_file, find, read_file

_DEFAULT = PictureLimits()


def decode(
    image: Any,
    *,
    ground: Ground = WHITE,
    limits: PictureLimits = _DEFAULT,
    processor: Any = None,
) -> Image.Image:
    """An image as the model sees it: 8-bit RGB, upright, opaque, without metadata.

    An image that is all this already (a plain RGB ``PIL.Image.Image`` in memory, such as this function
    returns) is returned unchanged. So a caller can decode once, then compute the key and compress.
    docs/pictures.md has the rules and their reasons.

    Args:
        image: a PIL image, opened lazily or not; a path; an http(s) URL, a data URI or base64; encoded
            bytes or an open binary file; an array or a tensor ``[H, W]``, ``[H, W, C]`` or
            ``[C, H, W]`` of uint8, uint16, bool, or floats from 0 to 1; or a mapping with one of them
            under ``bytes``, ``image``, ``path``, ``url``, ``base64`` or ``image_url``.
        ground: red, green and blue, shown through transparent pixels.
        limits: how large the image may be; checked before it is decoded.
        processor: the one that will prepare it, for ``limits.max_resized_pixels``.

    Raises:
        PictureError: not an image, an unreadable one, or one over the limits.
        ValueError: a ground that isn't a color.
    """
    ground = check_ground(ground)
    found, name = find(image, limits)
    if isinstance(found, np.ndarray):
        height, width = channels_last(found, name).shape[:2]
        limits.check_size(height, width, name, processor)
        return rgb_of_array(found, ground, name)
    if isinstance(found, Image.Image):
        # An open file that isn't loaded yet can't be read by two threads at once.
        with _lock_of(found), reading(name):
            limits.check_size(*upright_size(found), name, processor)
            if is_decoded(found):
                found.getim()  # raises if it is closed
                return found
            return rgb_of(found, ground)
    data = read_file(found, limits, name) if isinstance(found, Path) else found
    limits.check_bytes(len(data), name)
    if not data:
        raise PictureError(f"expected an image, got {name}, which is empty")
    with reading(name), Image.open(io.BytesIO(data)) as opened:
        limits.check_size(*upright_size(opened), name, processor)
        return rgb_of(opened, ground)


def size_of(
    image: Any, *, limits: PictureLimits = _DEFAULT, processor: Any = None
) -> tuple[int, int]:
    """Height and width of ``decode(image)``, from the header alone.

    Raises:
        PictureError: as ``decode``, as far as the header shows.
    """
    found, name = find(image, limits)
    if isinstance(found, np.ndarray):
        height, width = channels_last(found, name).shape[:2]
    elif isinstance(found, Image.Image):
        with _lock_of(found), reading(name):
            height, width = upright_size(found)
    else:
        if isinstance(found, Path):
            check_file(found, limits, name)
        else:
            limits.check_bytes(len(found), name)
        with (
            reading(name),
            Image.open(found if isinstance(found, Path) else io.BytesIO(found)) as opened,
        ):
            height, width = upright_size(opened)
    limits.check_size(height, width, name, processor)
    return height, width


def as_images(images: Any) -> Iterable[Any]:
    """An iterable of images, from one image or several.

    A four-dimensional array is a sequence of images, such as the frames of a video; a mapping, a path,
    bytes and an open file are one image. Nothing is decoded.

    Raises:
        PictureError: an array of no images.
    """
    if is_array(images):
        if len(images.shape) not in (1, 4):
            return [images]
        if not images.shape[0]:
            raise PictureError(
                f"expected at least one image, got an array of shape {list(images.shape)}"
            )
        return list(images)
    single = isinstance(
        images, str | os.PathLike | bytes | bytearray | memoryview | Mapping | Image.Image
    )
    if single or hasattr(images, "read") or not isinstance(images, Iterable):
        return [images]
    return images


def decode_each(images: Any, **options) -> Iterator[Image.Image]:
    """``decode`` for one image or several, one at a time.

    Args:
        images: as for ``as_images``.
        options: passed to ``decode``.

    Raises:
        PictureError: as ``decode``; with several images, the message says which one.
    """
    each = as_images(images)
    total = len(each) if isinstance(each, Sized) else None
    for number, image in enumerate(each, start=1):
        try:
            decoded = decode(image, **options)
        except PictureError as error:
            if total == 1:
                raise
            of = "" if total is None else f" of {total}"
            raise PictureError(f"image {number}{of}: {error}") from error
        yield decoded


def _lock_of(image: Image.Image) -> threading.Lock:
    # Kept in the image's attributes: images are not hashable, so a weak dictionary can't hold them.
    return image.__dict__.setdefault("_voco_decoding", threading.Lock())
