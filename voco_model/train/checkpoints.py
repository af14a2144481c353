"""Checkpoints that are whole or don't count.

A folder counts as a checkpoint once it holds ``complete.json``, written last, with the names and sizes
of all its files. Whatever is killed at whatever moment, the newest folder that agrees with its list is
where a run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

MARK = "complete.json"


def seal(folder: Path, **facts) -> None:
    """Declare a checkpoint whole; all its files must be written. ``facts`` are kept in the mark."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARK:
            _to_disk(path)
            files[str(path.relative_to(folder))] = path.stat().st_size
    partial = folder / f"{MARK}.partial"
    partial.write_text(json.dumps({**facts, "files": files}, indent=1))
    _to_disk(partial)
    os.replace(partial, folder / MARK)
    _to_disk(folder)


def read_mark(folder: Path) -> dict | None:
    """The facts of a whole checkpoint; None for one that isn't."""
    try:
        mark = json.loads((folder / MARK).read_text())
        sizes = {name: (folder / name).stat().st_size for name in mark["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mark if sizes == mark["files"] else None


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def folders(output: Path) -> list[Path]:
    """All checkpoint folders, whole or not, the newest first."""
    found = [p for p in output.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest(output: Path) -> Path | None:
    """The newest whole checkpoint."""
    return next((folder for folder in folders(output) if read_mark(folder) is not None), None)


def rotate(output: Path, keep: int) -> list[Path]:
    """Delete what is older than the newest whole checkpoint, but for the newest ``keep`` whole ones."""
    whole = [folder for folder in folders(output) if read_mark(folder) is not None]
    if not whole:
        return []
    older = [folder for folder in folders(output) if step_of(folder) < step_of(whole[0])]
    gone = [folder for folder in older if folder not in whole[:keep]]
    for folder in gone:
        discard(folder)
    return gone


def discard(folder: Path) -> None:
    """Delete a checkpoint folder, if it is there."""
    if folder.is_dir():
        # Without its mark first: a deletion that is cut off leaves nothing that looks whole.
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)


def check_space(output: Path, needed: int) -> None:
    """Raise ``OSError`` if the disk has less room than that."""
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"expected room for a checkpoint of {needed / 1e9:.1f} GB in {output}, got "
            f"{free / 1e9:.1f} GB; nothing was written or deleted: make room and start again, the run "
            "goes on from its newest checkpoint"
        )


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
