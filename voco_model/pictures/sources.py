"""Sources of images: paths, URLs, base64, bytes, file objects, rows of datasets, message parts."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from voco_model.pictures.arrays import array_of, is_array
from voco_model.pictures.errors import PictureError, reading
from voco_model.pictures.limits import PictureLimits, check_limits

# Keys under which dataset rows and message parts (Transformers', OpenAI's) hold an image.
_KEYS = ("bytes", "image", "path", "url", "base64", "image_url")
_SHOWN = 200  # characters of a path or URL in an error
_SHORTEST_BASE64 = 40  # characters: no image format fits into fewer
_TIMEOUT = 60.0  # seconds without a byte from a server
_KINDS = (
    "an image (PIL's, a path or URL, encoded bytes, an open file, an array, a tensor, or a mapping with "
    "one of these)"
)


def find(image: Any, limits: PictureLimits) -> tuple[Image.Image | np.ndarray | Path | bytes, str]:
    """The image as one of four types, and its name for error messages. Downloads, but reads no file.

    Raises:
        PictureError: an unsupported source, or a download that failed or is too large.
        TypeError: limits that aren't ``PictureLimits``.
    """
    check_limits(limits)
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", None)
        return image, _shown(str(name)) if name else f"a PIL image of mode {image.mode}"
    if isinstance(image, str):
        return _of_text(image, limits)
    if isinstance(image, os.PathLike):
        return Path(os.fsdecode(image)), _shown(os.fsdecode(image))
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        return data, f"{len(data):,} bytes"
    if isinstance(image, Mapping):
        return _of_mapping(image, limits)
    if is_array(image):
        kind = "a tensor" if isinstance(image, Tensor) else "an array"
        with reading(kind):
            return array_of(image), kind
    if hasattr(image, "read"):
        return _of_file(image, limits)
    got = "None" if image is None else type(image).__name__
    raise PictureError(f"expected {_KINDS}, got {got}")


def read_file(path: Path, limits: PictureLimits, name: str) -> bytes:
    """A file's bytes, read at once, so that a concurrent replacement can't mix with them.

    Raises:
        PictureError: a missing, unreadable or too large file.
    """
    check_file(path, limits, name)
    with reading(name):
        data = path.read_bytes()
    if not data:
        raise PictureError(f"expected an image, got {name}, which is empty")
    return data


def check_file(path: Path, limits: PictureLimits, name: str) -> None:
    """Raise ``PictureError`` unless it is a regular file within the limits."""
    try:
        there, is_file = path.exists(), path.is_file()
    except (OSError, ValueError):  # not a valid file name
        there = is_file = False
    if not there:
        raise PictureError(f"expected an image, got {name}, which was not found; check the path")
    if not is_file:
        raise PictureError(f"expected an image, got {name}, which is not a regular file")
    limits.check_bytes(path.stat().st_size, name)


def _of_text(text: str, limits: PictureLimits) -> tuple[Path | bytes, str]:
    if text.startswith(("http://", "https://")):
        return _download(text, limits), _shown(text)
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.endswith(";base64"):
            raise PictureError(f"expected a data URI in base64, got {_shown(header)!r}")
        limits.check_bytes(len(payload) * 3 // 4, "a data URI")
        return decode_base64(payload, "a data URI"), "a data URI"
    path = Path(text)
    encoded = None if _is_there(path) else base64_in(text)
    if encoded is None:
        return path, _shown(text) or "an empty path"
    limits.check_bytes(len(encoded), "base64 text")
    return encoded, "base64 text"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def base64_in(text: str) -> bytes | None:
    """The decoded bytes of base64 without a header, which Transformers accepts; None for a path."""
    if len(text) < _SHORTEST_BASE64:
        return None
    try:
        return decode_base64(text, "base64 text")
    except PictureError:
        return None


def decode_base64(payload: str, name: str) -> bytes:
    """The decoded bytes, ignoring white space; ``PictureError`` if this isn't base64."""
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"expected base64, got {name} that isn't: {error}") from error


def _of_mapping(given: Mapping, limits: PictureLimits):
    for key in _KEYS:
        value = given.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping) and any(isinstance(value.get(k), Mapping) for k in _KEYS):
            break  # OpenAI's image_url is a mapping inside a mapping; nothing is nested deeper
        if key == "base64" and isinstance(value, str):
            value = value if value.startswith("data:") else f"data:;base64,{value}"
        elif key == "bytes":
            found, name = find(value, limits)
            return found, _shown(str(given["path"])) if given.get("path") else name
        return find(value, limits)
    raise PictureError(
        f"expected a mapping with {', '.join(_KEYS)}, got one with {sorted(map(str, given))}"
    )


def _of_file(file: Any, limits: PictureLimits) -> tuple[bytes, str]:
    name = getattr(file, "name", None)
    name = _shown(name) if isinstance(name, str) else f"a {type(file).__name__}"
    with reading(name):
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)  # as Image.open does, so that a file can be passed twice
        data = file.read() if limits.max_bytes is None else file.read(limits.max_bytes + 1)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise PictureError(
            f"expected a file opened in binary mode, got {name}, which returns {type(data).__name__}"
        )
    limits.check_bytes(len(data), name)
    return bytes(data), name


def _download(url: str, limits: PictureLimits) -> bytes:
    import httpx  # a dependency of Transformers

    name = _shown(url)
    data = bytearray()
    with reading(name):
        with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                limits.check_bytes(len(data), name)
    return bytes(data)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
