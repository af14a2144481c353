"""Records: the JSON file that a benchmark writes.

A record holds ``schema``, ``bench`` (the name of its ``Family``), ``finished``, ``environment`` (device,
versions, commit, date), ``settings`` and, by family, ``cases``, ``ceilings`` and lists of other entries.
A case holds ``rows``, one for each thing that is compared, each with a ``status``:

* ``ok``: correct (or not compared, as an unmasked floor) and timed;
* ``red``: its error is over the limit; a red row carries no time;
* ``unsupported``, ``failed``, ``skipped``: not measured, and ``reason`` says why.

Times are in milliseconds, as ``p20``, ``p50``, ``p80`` and the number of ``repeats``.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

SCHEMA = 1
STATUSES = ("ok", "red", "unsupported", "failed", "skipped")

Records = dict[str, dict]
"""Records by file name, oldest first."""


def save(record: dict, path: Path) -> None:
    """Write a record as JSON; a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(_finite(record), indent=1) + "\n")
    os.replace(half, path)


def load(path: Path) -> dict:
    """The JSON in a file, unchecked.

    Raises:
        ValueError: the file isn't JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {path}, got: {error}") from error


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they become strings, so that any reader can load the
    file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def timed(case: dict) -> list[dict]:
    """The rows of a case that were correct and timed."""
    return [row for row in case["rows"] if row["status"] == "ok"]


def named(case: dict | None, name: str) -> dict | None:
    """The row of that name, if it was timed."""
    return next((row for row in timed(case) if row["name"] == name), None) if case else None


def device_of(record: dict) -> str:
    """The name of the device that a record was measured on."""
    return record["environment"]["device"]["name"]


def is_on_gpu(record: dict) -> bool:
    """Whether a record was measured on a CUDA device."""
    return record["environment"]["device"]["type"] == "cuda"


def newest_by_device(results: Records, device_type: str) -> list[tuple[str, dict]]:
    """File name and record: for each device of a type the newest one."""
    newest = {}
    for name, record in results.items():
        if record["environment"]["device"]["type"] == device_type:
            newest[device_of(record)] = (name, record)
    return list(newest.values())
