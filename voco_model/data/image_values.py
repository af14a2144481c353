"""Images in records: file names, encoded bytes, base64, and URLs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from voco_model.data.faults import DataError
from voco_model.pictures import PictureError
from voco_model.pictures.sources import decode_base64

# Longer than any file name: a longer string is the file itself, in base64.
_LONGEST_NAME = 4096
# Keys of an image in a content part, as Transformers, Qwen and OpenAI name them.
_NAMES_IN_PARTS = ("image", "image_url", "url", "path", "base64")


def in_part(part: Mapping[str, Any], where: str) -> Any:
    """The image in a content part, as ``in_column`` returns it; None if there is none.

    Raises:
        DataError: as ``in_column``; an image under several names.
    """
    given = {name: part[name] for name in _NAMES_IN_PARTS if part.get(name) is not None}
    if part.get("bytes") is not None:  # then path is only a name
        given = {**{n: v for n, v in given.items() if n != "path"}, "bytes": part["bytes"]}
    if len(given) > 1:
        raise DataError(
            "bad_record", where, f"expected one image in a part, got {', '.join(given)}"
        )
    for name, value in given.items():
        if isinstance(value, Mapping) and "url" in value:  # OpenAI's
            value = value["url"]
        if name == "base64" and isinstance(value, str) and not value.startswith("data:"):
            return _decoded(value, where)
        return in_column(value, where)
    return None


def in_column(value: Any, where: str) -> Any:
    """Convert a data set's value to what ``Picture.of`` takes.

    ``data:`` URLs and base64 become bytes, ``file:`` URLs a path; other values are returned unchanged.

    Raises:
        DataError: a URL on the network, or invalid base64.
    """
    if not isinstance(value, str):
        return value
    scheme = value[:8].partition(":")[0].lower()
    if scheme == "data":
        header, comma, content = value.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise DataError(
                "bad_record", where, f"expected data:...;base64,... got {value[:40]!r}..."
            )
        return _decoded(content, where)
    if scheme in ("http", "https", "s3", "gs"):
        raise DataError(
            "missing_file",
            where,
            f"expected an image in a file, got the URL {value[:200]}; training doesn't download: "
            "save the image and give its file name",
        )
    if scheme == "file":
        return unquote(urlsplit(value).path)
    if len(value) > _LONGEST_NAME:
        return _decoded(value, where)
    return value


def _decoded(text: str, where: str) -> bytes:
    try:
        return decode_base64(text, f"{text[:40]!r}...")
    except PictureError as error:
        raise DataError("broken_image", where, str(error)) from error
