"""Checks that a local checkpoint is there and complete, before anything reads it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from voco_model.data.file_kind import check_no_pointer

_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors' own reader
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_folder(path: str | os.PathLike) -> None:
    """Raise ``FileNotFoundError`` unless this is a checkpoint's folder, or may be a hub name.

    The message names checkpoints one folder below, as a training run's output has them.
    """
    folder = Path(path)
    if not folder.exists():
        if _HUB_NAME.fullmatch(os.fspath(path)) and not os.fspath(path).startswith("."):
            return  # the hub's client says what is wrong with a name
        raise FileNotFoundError(
            f"expected a checkpoint's folder or a hub name, got {path}, which was not found; check the "
            "path"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a checkpoint's folder, got the file {path}")
    if (folder / "config.json").exists():
        return
    inside = [str(found.parent) for found in sorted(folder.glob("*/config.json"))]
    advice = f"did you mean {listed(inside)}?" if inside else "check the path"
    raise FileNotFoundError(
        f"expected a checkpoint's folder with a config.json, got {path} without one; {advice}"
    )


def check_files(path: str | os.PathLike) -> None:
    """Check the files that a checkpoint's reader would open, without reading tensors.

    Args:
        path: a folder. Hub names are skipped: the hub's client checks its downloads.

    Raises:
        ValueError: a Git LFS pointer in place of a file, a missing shard, an empty file, or truncated
            safetensors. The message names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    weights = weight_files(folder)
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise ValueError(
            f"expected all files of the index in {folder}, got none named {listed(missing)}; download "
            "them again"
        )
    for file in sorted({*folder.glob("*.json"), *folder.glob("tokenizer.model"), *weights}):
        with file.open("rb") as opened:
            check_no_pointer(opened.read(64), file)
        if not file.stat().st_size:
            raise ValueError(
                f"expected a file with content, got an empty {file}; download it again"
            )
    config = folder / "config.json"
    if config.is_file():
        try:
            json.loads(config.read_bytes())
        except ValueError as error:
            raise ValueError(f"expected JSON in {config}, got {error}; download it again") from None
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights, as listed by the index if there is one. Safetensors are preferred.

    Raises:
        ValueError: an index that can't be read.
    """
    for index, single in (
        (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME),
        (WEIGHTS_INDEX_NAME, WEIGHTS_NAME),
    ):
        if (folder / single).is_file():  # from_pretrained, too, prefers it to an index
            return [folder / single]
        if (folder / index).is_file():
            return sorted({folder / name for name in _weight_map(folder / index).values()})
    return []


def listed(names, most: int = 5) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _weight_map(index: Path) -> dict[str, str]:
    text = index.read_bytes()
    check_no_pointer(text[:64], index)
    try:
        return dict(json.loads(text)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected an index with a weight_map, got {index}, which has none or is truncated; "
            "download it again"
        ) from error


def _check_safetensors(file: Path) -> None:
    """Raise ``ValueError`` unless the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= _LONGEST_HEADER else b""
    try:
        tensors = json.loads(header)
        end = max(
            (t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"expected safetensors, got {file}, whose header is unreadable; download it again"
        ) from None
    if size != 8 + length + end:
        raise ValueError(
            f"expected safetensors of {8 + length + end} bytes, got {size} in {file}, which is "
            "truncated or has extra bytes at its end; download it again"
        )
