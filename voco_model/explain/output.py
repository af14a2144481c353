"""Which files an explanation can be written to; checked before anything heavy is imported."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from pathlib import Path

SUFFIXES = (".png", ".html")


def check_path(path: str | PathLike) -> str:
    """The suffix of a file that ``draw`` can write; raises what ``draw`` raises."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected a file ending in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not Path(path).parent.is_dir():
        raise ValueError(
            f"expected a file in an existing folder, got {str(path)!r}; create {Path(path).parent} first"
        )
    if find_spec("matplotlib") is None:
        raise ImportError(
            "drawing an explanation needs matplotlib, which is not installed; "
            "pip install 'voco-kernels[bench]'"
        )
    return suffix
