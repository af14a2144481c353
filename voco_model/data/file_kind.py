"""Detects what a file of records holds by its first bytes, and says how to convert it to UTF-8 text."""

from __future__ import annotations

import codecs
import json
import shlex
from pathlib import Path

# How the pointer begins that a clone without Git LFS has instead of a large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PACKED = {  # magic number -> what it is, the command that unpacks it to stdout, its suffix
    b"\x1f\x8b": ("gzip", "gzip -dc", ".gz"),
    b"BZh": ("bzip2", "bzip2 -dc", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", "xz -dc", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc", ".zst"),
    b"PK\x03\x04": ("zip", "unzip -p", ".zip"),
}
PACKED_SUFFIXES = tuple(suffix for _, _, suffix in _PACKED.values())
_PARQUET = b"PAR1"


def start_of_text(path: Path) -> int:
    """Offset of the text in a JSON file: after the byte order mark, if there is one.

    Raises:
        ValueError: not UTF-8: another encoding, a compressed file, Parquet, or a Git LFS pointer.
    """
    with path.open("rb") as file:
        head = file.read(64)
    check_no_pointer(head, path)
    for magic, (name, command, suffix) in _PACKED.items():
        if head.startswith(magic):
            suffixed = path.suffix.lower() == suffix
            unpacked = path.with_suffix("") if suffixed else _beside(path, "unpacked")
            raise ValueError(
                f"expected JSON as text, got {name} in {path}; records are read at their offsets, so "
                f"unpack it first: {_shell(command, path, unpacked)}"
            )
    if head.startswith(_PARQUET):
        raise ValueError(f"expected JSON, got Parquet in {path}; name the file .parquet")
    if head and not head.strip(b"\0"):
        raise ValueError(
            f"expected JSON, got only zero bytes in {path}; its writing was interrupted: write it again"
        )
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-BE", "BE").replace("-LE", "LE")
        raise ValueError(
            f"expected the encoding UTF-8, got {name} in {path}; {to_utf8(name, path)}"
        )
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def check_parquet(path: Path) -> None:
    """Raise ``ValueError`` for a ``.parquet`` that isn't Parquet or is truncated."""
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(-min(4, path.stat().st_size), 2)
        tail = file.read(4)
    check_no_pointer(head, path)
    if not head.startswith(_PARQUET):
        raise ValueError(f"expected Parquet, got something else in {path}")
    if tail != _PARQUET:
        raise ValueError(f"expected Parquet, got a truncated file: {path}; download it again")


def check_no_pointer(head: bytes, path: Path) -> None:
    """Raise ``ValueError`` for a file that begins like a Git LFS pointer."""
    if head.startswith(LFS_POINTER):
        raise ValueError(
            f"expected a file's content, got a Git LFS pointer in {path}; download the large files "
            f"with: git -C {shlex.quote(str(path.parent))} lfs pull"
        )


def to_utf8(encoding: str, path: Path) -> str:
    """The command that writes the file in UTF-8, beside it."""
    return _shell(f"iconv -f {encoding} -t UTF-8", path, _beside(path, "utf-8"))


def _beside(path: Path, what: str) -> Path:
    """``data.json`` -> ``data.utf-8.json``."""
    return path.with_name(f"{path.stem}.{what}{path.suffix}")


def _shell(command: str, source: Path, target: Path) -> str:
    return f"{command} {shlex.quote(str(source))} > {shlex.quote(str(target))}"
