"""Atomic checkpoints.

A folder is a checkpoint once it has ``complete.json``, written last, with the names and sizes of all its
files. Wherever a run is killed, it resumes from the newest folder whose files match that list.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

MARK = "complete.json"


def seal(folder: Path, **facts) -> None:
    """Declare a checkpoint complete, once all its files are written; ``facts`` go into its mark."""
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
    """The mark of a complete checkpoint; None for an incomplete one."""
    try:
        mark = json.loads((folder / MARK).read_text())
        sizes = {name: (folder / name).stat().st_size for name in mark["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mark if sizes == mark["files"] else None


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def folders(output: Path) -> list[Path]:
    """All checkpoint folders, complete or not, the newest first."""
    found = [p for p in output.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((folder for folder in folders(output) if read_mark(folder) is not None), None)


def rotate(output: Path, keep: int) -> list[Path]:
    """Delete folders older than the newest complete checkpoint, except ``keep`` complete ones."""
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
        # The mark goes first, so that an interrupted deletion leaves an incomplete checkpoint.
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)


def check_space(output: Path, needed: int) -> None:
    """Raise ``OSError`` if the disk has less than ``needed`` bytes of free space."""
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"expected {needed / 1e9:.1f} GB of free space for a checkpoint in {output}, got "
            f"{free / 1e9:.1f} GB; nothing was written or deleted: free some and start again, the run "
            "resumes from its newest checkpoint"
        )


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
