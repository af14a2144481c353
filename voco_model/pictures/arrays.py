"""NumPy arrays and tensors to 8-bit RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from voco_model.pictures.errors import PictureError
from voco_model.pictures.ground import Ground, composite

_CHANNELS = (1, 3, 4)


def is_array(value: Any) -> bool:
    """Whether this is an array or a tensor of any library."""
    return isinstance(value, np.ndarray | Tensor) or (
        hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype")
    )


def array_of(value: Any) -> np.ndarray:
    """A NumPy array of the same values; bfloat16 and float16 become float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.float()
        return value.numpy()
    return np.asarray(value)


def channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """A view as ``[H, W]`` or ``[H, W, C]``.

    The channels are the first or the last dimension, whichever has 1, 3 or 4 elements.

    Raises:
        PictureError: neither or both could be channels, or another number of dimensions.
    """
    shape = list(array.shape)
    if array.ndim == 2:
        return array
    if array.ndim == 4:
        raise PictureError(
            f"expected one image, got {name} of shape {shape}, a batch; pass its images one by one"
        )
    if array.ndim != 3:
        raise PictureError(
            f"expected an image of shape [H, W], [H, W, C] or [C, H, W], got {name} of shape {shape}"
        )
    first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
    if first and last:
        raise PictureError(
            f"expected a shape that tells where the channels are, got {name} of shape {shape}, where "
            "both ends could be; pass PIL.Image.fromarray(array of shape [H, W, C])"
        )
    if not first and not last:
        raise PictureError(
            f"expected 1, 3 or 4 channels, first or last, got {name} of shape {shape}"
        )
    return np.moveaxis(array, 0, -1) if first else array


def rgb_of_array(array: np.ndarray, ground: Ground, name: str) -> Image.Image:
    """RGB of ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``; a fourth channel is alpha.

    Raises:
        PictureError: an ambiguous shape, a dtype of unknown range, or floats outside 0..1.
    """
    pixels = _eight_bits(channels_last(array, name), name)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return composite(image, ground) if image.mode == "RGBA" else image.convert("RGB")


def _eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # x / 257, rounded
    if array.dtype.kind == "f":
        return _from_floats(array, name)
    raise PictureError(
        "expected uint8, uint16, bool, or floats from 0 to 1, got "
        f"{name} of {array.dtype}, whose range is unknown; if its values are 0 to 255, pass uint8"
    )


def _from_floats(array: np.ndarray, name: str) -> np.ndarray:
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        raise PictureError(f"expected finite values, got {name} with NaN or infinity")
    if least < 0:
        raise PictureError(
            f"expected floats from 0 to 1, got {name} with {least:.4g} to {most:.4g}; pass the image "
            "itself, not a processor's normalized output, and clip the overshoot of filters"
        )
    if most > 1:
        raise PictureError(
            f"expected floats from 0 to 1, got {name} with {least:.4g} to {most:.4g}; if 255 is white, "
            "pass it as uint8"
        )
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
