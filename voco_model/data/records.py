"""Where records come from: JSON, JSON Lines, or a data set of Hugging Face ``datasets``.

Files are read once for the places of their records, and a record when it is wanted: worker processes
share a few megabytes of places instead of the 665k records of LLaVA-1.5, each with a copy.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from voco_model.data.faults import DataError


class Records(Protocol):
    """A sequence of records (dicts), of which each can say where it stands."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises ``DataError`` of kind ``bad_record``."""

    def where(self, index: int) -> str: ...

    def state(self) -> str:
        """Changes whenever the records do, as far as that can be seen without reading them."""


class FileRecords:
    """Records of a JSON or JSON Lines file, by their place in it.

    Args:
        path: a file that holds one array of objects (``.json``), or an object a line (``.jsonl``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a ``.json`` that is no array.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"expected a file of records, got {self.path}, which isn't there"
            )
        places = list(_lines(self.path) if self.path.suffix == ".jsonl" else _elements(self.path))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop, _ = self._places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError("bad_record", self.where(index), f"no JSON: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError("bad_record", self.where(index), f"expected an object, got {kind}")
        return record

    def where(self, index: int) -> str:
        return f"{self.path}:{self._places[index, 2]}"

    def state(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Start, stop and line of each record."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, start + len(line), number
            start += len(line)


# What matters for the depth of nesting; strings are skipped whole, brackets in them too.
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}\n]|[^\s\[\]{}",:]+', re.DOTALL)


def _elements(path: Path) -> Iterator[tuple[int, int, int]]:
    """Start, stop and line of each element of an array, in bytes; of no more than its brackets."""
    if path.stat().st_size == 0:
        raise ValueError(f"expected a JSON array of records, got an empty file: {path}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        depth, line, start, start_line, closed = 0, 1, 0, 0, False
        for token in _TOKENS.finditer(text):
            word = token.group()
            if word == b"\n":
                line += 1
            elif depth == 0 and word != b"[" or closed:
                break
            elif word in b"[{":
                if depth == 1:
                    start, start_line = token.start(), line
                depth += 1
            elif word in b"]}":
                depth -= 1
                closed = depth == 0
                if depth == 1:
                    yield start, token.end(), start_line
            elif depth == 1:  # no object; whoever reads it says so
                yield token.start(), token.end(), line
            else:
                line += word.count(b"\n")
        else:
            if closed:
                return
    raise ValueError(
        f"expected a JSON array of records, got one that breaks off or something else at line {line} "
        f"of {path}; for an object a line, name the file .jsonl"
    )


class DatasetRecords:
    """Rows of a ``datasets.Dataset``: parquet, Arrow, or a data set of the hub.

    Images stay encoded until they are wanted.
    """

    def __init__(self, dataset, name: str) -> None:
        self._dataset, self._name = undecoded(dataset), name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[int(index)]

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def state(self) -> str:
        return f"{self._name} {self._dataset._fingerprint}"


def undecoded(dataset):
    """The data set with its image columns as ``{"bytes", "path"}``."""
    from datasets import Image
    from datasets.features import List

    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def load_dataset_of(path: str, split: str, *, streaming: bool = False):
    """A data set of the hub, or of a local parquet file or folder, through ``datasets``.

    Raises:
        ModuleNotFoundError: the extra ``train`` isn't installed.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package datasets, which reads parquet and the hub; pip install "
            "'voco-kernels[train]'"
        ) from error
    if path.endswith(".parquet"):
        return load_dataset("parquet", data_files={split: path}, split=split, streaming=streaming)
    return load_dataset(path, split=split, streaming=streaming)


def open_records(path: str, split: str = "train") -> Records:
    """Records of a ``.json``, ``.jsonl``, ``.parquet``, or of a data set's name on the hub."""
    if Path(path).suffix in (".json", ".jsonl"):
        return FileRecords(path)
    return DatasetRecords(load_dataset_of(path, split), path)
