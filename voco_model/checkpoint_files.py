"""Whether the files of a local checkpoint are all there and whole, before anything reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from voco_model.data.file_kind import check_no_pointer

_WHOLE = 100_000_000  # bytes: more than any header of safetensors, as its own reader has it


def check_files(path: str | os.PathLike) -> None:
    """Look at the files that a checkpoint's reader would open; not at their tensors.

    Args:
        path: a folder. A hub name is passed over: the hub's client checks what it downloads.

    Raises:
        ValueError: a pointer of Git LFS in place of a file, a shard of the index that isn't there, an
            empty file, or safetensors that break off. The message names the file.
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
            raise ValueError(f"expected a file's content, got an empty {file}; download it again")
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
    """The files with weights, safetensors where there are both kinds; those of an index by its word.

    Raises:
        ValueError: an index that can't be read.
    """
    for index, single in (
        (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME),
        (WEIGHTS_INDEX_NAME, WEIGHTS_NAME),
    ):
        if (folder / single).is_file():  # which from_pretrained prefers to an index, too
            return [folder / single]
        if (folder / index).is_file():
            return sorted({folder / name for name in _weight_map(folder / index).values()})
    return []


def listed(names, most: int = 5) -> str:
    """The first of the names, and how many more there are."""
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
            f"expected an index with a weight_map, got {index}, which has none or breaks off; download "
            "it again"
        ) from error


def _check_safetensors(file: Path) -> None:
    """Raise ``ValueError`` unless the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= _WHOLE else b""
    try:
        tensors = json.loads(header)
        end = max(
            (t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"expected safetensors, got {file}, whose header can't be read; download it again"
        ) from None
    if size != 8 + length + end:
        raise ValueError(
            f"expected safetensors of {8 + length + end} bytes, got {size} in {file}, which "
            "breaks off or has more behind it; download it again"
        )
