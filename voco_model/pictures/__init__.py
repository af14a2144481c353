"""Images in any form, decoded to 8-bit RGB (docs/pictures.md)."""

from voco_model.pictures.decode import as_images, decode, decode_each, size_of
from voco_model.pictures.errors import PictureError
from voco_model.pictures.ground import WHITE, ground_of
from voco_model.pictures.limits import PictureLimits

__all__ = [
    "WHITE",
    "PictureError",
    "PictureLimits",
    "as_images",
    "decode",
    "decode_each",
    "ground_of",
    "size_of",
]
