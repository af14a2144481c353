"""The color that shows through transparent pixels."""

from __future__ import annotations

from typing import Any

from PIL import Image

from voco_model.arguments import is_whole

Ground = tuple[int, int, int]
WHITE: Ground = (255, 255, 255)


def check_ground(ground: Any) -> Ground:
    """Three ints from 0 to 255; ``ValueError`` for anything else."""
    try:
        colour = tuple(ground)
    except TypeError:
        colour = ()
    if len(colour) != 3 or not all(is_whole(value) and 0 <= value <= 255 for value in colour):
        raise ValueError(
            f"expected ground as three numbers from 0 to 255 (red, green, blue), got {ground!r}"
        )
    return tuple(map(int, colour))


def ground_of(config: Any, ground: Any = None) -> Ground:
    """The color behind transparent pixels: ``ground``, else the one in a model's config, else white."""
    if ground is None:
        ground = getattr(config, "voco_ground", None)
    return WHITE if ground is None else check_ground(ground)


def composite(image: Image.Image, ground: Ground) -> Image.Image:
    """RGB, with ``ground`` behind transparent pixels."""
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode == "P":
        image = image.copy()  # Pillow 13 changes the palette of what it converts to RGBA
    below = Image.new("RGBA", image.size, (*ground, 255))
    return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
