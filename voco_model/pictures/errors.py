"""``PictureError``: the error for anything that isn't a usable image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError


class PictureError(ValueError):
    """Not an image, an unreadable one, or one over the limits; the message names it."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any error of a decoder into a ``PictureError`` that names the image."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message shows a file object's address
        raise PictureError(
            f"expected an image, got {name}, in no format that Pillow can read"
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"expected an image within Pillow's own limit, got {name}: {error}; raise "
            "PIL.Image.MAX_IMAGE_PIXELS if it can be trusted"
        ) from error
    except (
        Exception
    ) as error:  # decoders raise anything: SyntaxError, struct.error, RuntimeError, ...
        raise PictureError(
            f"reading {name} as an image failed: {type(error).__name__}: {error}"
        ) from error
