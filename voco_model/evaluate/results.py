"""The results folder: a JSON file per method, and the table of all methods."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from voco_model.evaluate.benchmarks import scores_of
from voco_model.evaluate.tables import BOUNDS, Row, table

FORMAT = 1
TABLE = "table.md"
# What must be equal in all files of a folder for their rows to share a table.
_COMPARABLE = ("limit", "paper_model", "several_images", "tasks")


def versions() -> dict[str, str | None]:
    """Versions of the packages that a score depends on; None for one that isn't installed."""
    found = {}
    for name in ("voco-kernels", "lmms-eval", "torch", "transformers", "datasets", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def file_of(output: Path, run: str) -> Path:
    """The file of a run such as ``"voco:1"``. A bound has one file for any number of tokens."""
    method = run.partition(":")[0]
    return output / f"{method if method in BOUNDS else run.replace(':', '-')}.json"


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Write a method's file, and update the folder's table.

    Args:
        record: ``run`` (``"voco:1"``), ``method``, ``label``, ``num_tokens``, ``results`` (lmms-eval's)
            and what they were measured with; see ``run.evaluate``.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = file_of(output, record["run"])
    _replace(path, json.dumps({"format": FORMAT, **record}, indent=1, default=str) + "\n")
    _replace(output / TABLE, table_of(output) + "\n")


def check_new(output: Path, run: str) -> None:
    """Raise ``ValueError`` if the folder already has results of this run."""
    path = file_of(output, run)
    if path.exists():
        raise ValueError(
            f"expected no results of {run} yet, got {path}; remove it or name another folder"
        )


def check_comparable(output: Path, facts: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the folder's files were measured with other facts than these."""
    for path, record in read(output).items():
        for name in _COMPARABLE:
            if record[name] != facts[name]:
                raise ValueError(
                    f"expected {name} {facts[name]!r} as now, got {record[name]!r} in {path}, whose row "
                    "would stand in the same table; name another folder"
                )


def read(output: Path) -> dict[Path, dict]:
    """The records of a folder, by file.

    Raises:
        ValueError: a file that isn't such a record.
    """
    found = {}
    for path in sorted(output.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"expected results as JSON in {path}, got {error}") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(
                f"expected results of format {FORMAT} in {path}, got something else; name a folder that "
                "holds only results"
            )
        found[path] = record
    return found


def table_of(output: Path) -> str:
    """The table of a folder's records."""
    records = list(read(output).values())
    rows = [
        Row(record["method"], record["label"], record["num_tokens"], scores_of(record["results"]))
        for record in records
    ]
    return table(rows, records[0]["paper_model"] if records else None)


def _replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_text(text)
    os.replace(aside, path)
