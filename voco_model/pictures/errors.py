"""``PictureError``: the one error for something that isn't a usable picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError


class PictureError(ValueError):
    """Not a picture, one that can't be read, or one beyond the limits; the message names it."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into a ``PictureError`` that names the picture."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message shows a file object's address
        raise PictureError(
            f"expected an image that can be read, got {name}, of no format that Pillow knows"
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
            f"expected an image that can be read, got {name}: {type(error).__name__}: {error}"
        ) from error
