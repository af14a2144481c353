"""``PictureLimits``: the largest images to read, checked before they are decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from voco_model.arguments import is_whole
from voco_model.pictures.errors import PictureError


@dataclass(frozen=True)
class PictureLimits:
    """The largest images to read. None switches a limit off.

    The size is read from the header, so an image over a limit is refused before it is decoded.

    Attributes:
        max_bytes: bytes of the encoded file, the download or the base64 text.
        max_pixels: pixels of the image, and of the square to which a processor with ``do_pad`` pads it;
            by default where Pillow starts to warn. Pillow itself refuses images of more than twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, whatever this limit.
        max_aspect_ratio: the longer side divided by the shorter one.
        max_resized_pixels: pixels to which the image processor resizes the image before it crops. A
            processor that resizes the shorter side to 336 turns 1 x 600 pixels into 336 x 201,600, at
            about 10 bytes each.

    Raises:
        ValueError: a limit that isn't a positive number.
    """

    max_bytes: int | None = 1 << 27
    max_pixels: int | None = 89_478_485
    max_aspect_ratio: float | None = 200.0
    max_resized_pixels: int | None = 1 << 24

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "max_aspect_ratio":
                number = isinstance(value, Real) and not isinstance(value, bool)
            else:
                number = is_whole(value)
            if not (number and value > 0):
                kind = "a number" if field.name == "max_aspect_ratio" else "an int"
                raise ValueError(f"expected {field.name} as {kind} > 0 or None, got {value!r}")

    def check_bytes(self, count: int, name: str) -> None:
        """Raise ``PictureError`` for an encoded image with too many bytes."""
        if self.max_bytes is not None and count > self.max_bytes:
            raise _beyond("max_bytes", f"of at most {self.max_bytes:,} bytes", name, f"{count:,}")

    def check_size(self, height: int, width: int, name: str, processor: Any = None) -> None:
        """Raise ``PictureError`` for an image with too many pixels or too large an aspect ratio.

        Args:
            processor: the one that will prepare it, for ``max_resized_pixels``; None skips that limit.
        """
        if height < 1 or width < 1:
            raise PictureError(
                f"expected an image of at least one pixel, got {name} of {width} x {height}"
            )
        size = f"{width:,} x {height:,}"
        if self.max_pixels is not None and height * width > self.max_pixels:
            raise _beyond("max_pixels", f"of at most {self.max_pixels:,} pixels", name, size)
        ratio = max(height, width) / min(height, width)
        if self.max_aspect_ratio is not None and ratio > self.max_aspect_ratio:
            raise _beyond(
                "max_aspect_ratio",
                f"with sides of at most 1 to {self.max_aspect_ratio:g}",
                name,
                size,
            )
        if processor is None:
            return
        padded, resized = processed_pixels(processor, height, width)
        if self.max_pixels is not None and padded > self.max_pixels:
            raise _beyond(
                "max_pixels",
                f"that its processor pads to at most {self.max_pixels:,} pixels",
                name,
                f"{size}, which makes {padded:,}",
            )
        if self.max_resized_pixels is not None and resized > self.max_resized_pixels:
            raise _beyond(
                "max_resized_pixels",
                f"that its processor resizes to at most {self.max_resized_pixels:,} pixels",
                name,
                f"{size}, which makes {resized:,}",
            )


def check_limits(limits: Any) -> None:
    """Raise ``TypeError`` for anything but ``PictureLimits``."""
    if not isinstance(limits, PictureLimits):
        raise TypeError(
            f"expected limits as PictureLimits(...), got {type(limits).__name__}; set its fields to "
            "None to switch them off"
        )


def processed_pixels(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Pixels of an image after a processor's padding to a square, and after its resizing.

    Args:
        processor: a LLaVA's processor or its image processor.
    """
    images = getattr(processor, "image_processor", processor)
    size = images.size or {}
    padded = height * width
    pinpoints = getattr(images, "image_grid_pinpoints", None)
    if pinpoints:  # LLaVA-NeXT cuts images of any size into a grid of tiles
        return padded, max(high * wide for high, wide in pinpoints)
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        height = width = max(height, width)
        padded = height * width
    if not images.do_resize:
        return padded, 0
    short, long = _entry(size, "shortest_edge"), _entry(size, "longest_edge")
    if short:
        other = short * max(height, width) // min(height, width)
        if long and other > long:
            short, other = long * short // other, long
        return padded, short * other
    high = _entry(size, "height") or _entry(size, "max_height") or 0
    wide = _entry(size, "width") or _entry(size, "max_width") or 0
    return padded, high * wide


def _entry(size: Any, name: str) -> int | None:
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)


def _beyond(limit: str, expected: str, name: str, got: str) -> PictureError:
    return PictureError(
        f"expected an image {expected}, got {name} of {got}; raise {limit} of PictureLimits if such "
        "images can be afforded"
    )
