"""Records from JSON, JSON Lines, or a data set of Hugging Face ``datasets``.

A file is scanned once for the offsets of its records, and each record is read on access: worker
processes share a few megabytes of offsets, instead of holding a copy of LLaVA-1.5's 665k records each.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from voco_model.data.faults import DataError
from voco_model.data.file_kind import PACKED_SUFFIXES, check_parquet, start_of_text, to_utf8


class Records(Protocol):
    """A sequence of records (dicts) that knows the place of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises ``DataError`` of kind ``bad_record``."""

    def where(self, index: int) -> str: ...

    def state(self) -> str:
        """A text that changes with the records, as far as can be seen without reading them."""


class FileRecords:
    """Records of a JSON or JSON Lines file, read at their offsets.

    Args:
        path: a file with one array of objects (``.json``), or one object per line (``.jsonl``,
            ``.ndjson``), in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a ``.json`` that isn't an array, a ``.jsonl`` that is one, another encoding, or a
            compressed file; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"expected a file of records, got no such file: {self.path}")
        start = start_of_text(self.path)
        read = _lines if self.path.suffix.lower() in _LINES else _elements
        self._places = np.array(list(read(self.path, start)), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop, _ = self._places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            record = json.loads(text.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise DataError(
                "bad_record", self.where(index), self._encoding(index, error)
            ) from error
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deep
            raise DataError("bad_record", self.where(index), f"not JSON: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError("bad_record", self.where(index), f"expected an object, got {kind}")
        return record

    def _encoding(self, index: int, error: UnicodeDecodeError) -> str:
        start, _, line = self._places[index]
        line += error.object.count(b"\n", 0, error.start)
        return (
            f"expected the encoding UTF-8, got byte 0x{error.object[error.start]:02x} at offset "
            f"{start + error.start}, line {line}; if the file is in Windows-1252 or Latin-1: "
            + to_utf8("WINDOWS-1252", self.path)
        )

    def where(self, index: int) -> str:
        """File and line, and the record's number if its line has several."""
        line = self._places[index, 2]
        several = (self._places[max(index - 1, 0) : index + 2, 2] == line).sum() > 1
        return f"{self.path}:{line}" + (f", record {index}" if several else "")

    def state(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


_LINES = (".jsonl", ".ndjson")


def _lines(path: Path, start: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and line of each record."""
    found = False
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, 1):
            if word := line.strip():
                if not found:
                    _check_first_line(word, number, path)
                found = True
                yield start, start + len(line), number
            start += len(line)


def _check_first_line(word: bytes, number: int, path: Path) -> None:
    said = f"expected one object per line, got {{}} at line {number} of {path}; name the file .json"
    if word.startswith(b"["):
        raise ValueError(said.format("an array"))
    if word == b"{":
        more = ", with all objects in one array: brackets around them and commas between"
        raise ValueError(said.format("an object over several lines") + more)


# Tokens that decide the depth of nesting; a string, with any brackets in it, is one token.
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}\n]|[^\s\[\]{}",:]+', re.DOTALL)


def _elements(path: Path, begin: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and line of each element of an array, in bytes, found by its brackets alone."""
    if path.stat().st_size == begin:
        raise ValueError(f"expected a JSON array of records, got an empty file: {path}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        depth, line, start, start_line, closed = 0, 1, 0, 0, False
        for token in _TOKENS.finditer(text, begin):
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
            elif depth == 1:  # not an object, which reading it will report
                yield token.start(), token.end(), line
            else:
                line += word.count(b"\n")
        else:
            if closed:
                return
            word = b""
        if depth:
            got = "one that is cut off"
            advice = "the file is incomplete: download or write it again"
        elif closed:
            got = "something after it"
            advice = "put all records into one array"
        elif word == b"{":
            got, advice = _objects(text, begin, path)
        else:
            got = "something else" if word else "nothing"
            advice = "records are objects with conversations or messages"
    raise ValueError(
        f"expected a JSON array of records, got {got} at line {line} of {path}; {advice}"
    )


def _objects(text: mmap.mmap, begin: int, path: Path) -> tuple[str, str]:
    """What a file that begins with an object holds, and advice on it."""
    depth, objects, spread, arrays, previous = 0, 0, False, [], b""
    for token in _TOKENS.finditer(text, begin):
        word = token.group()
        if word == b"\n":
            spread = spread or depth > 0
            continue
        if objects:
            objects += 1
            break
        if word == b"[" and depth == 1 and previous.startswith(b'"'):
            arrays.append(json.loads(previous.decode("utf-8", "replace"), strict=False))
        depth += (word in b"[{") - (word in b"]}")
        objects += depth == 0
        previous = word
    records = [name for name in arrays if name not in ("conversations", "messages")]
    if not objects:
        return "an object that is cut off", "the file is incomplete: download or write it again"
    if objects == 1 and records == arrays and arrays:
        target = path.with_name(f"{path.stem}.{records[0]}{path.suffix}")
        command = (
            "import json, sys; json.dump(json.load(open(sys.argv[1], encoding='utf-8-sig'))"
            f"[{records[0]!r}], open(sys.argv[2], 'w'))"
        )
        words = map(shlex.quote, ("python", "-c", command, str(path), str(target)))
        return f"an object with lists under {', '.join(arrays)}", "extract one: " + " ".join(words)
    if spread:
        return "objects", "put them into one array: brackets around them and commas between"
    return "one object per line", "name the file .jsonl"


class DatasetRecords:
    """Rows of a ``datasets.Dataset``: Parquet, Arrow, or a data set of the hub.

    Images stay encoded until they are opened.
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
    """The data set with its images as ``{"bytes", "path"}``, at any depth of its columns."""
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        other = _undecoded(feature)
        if other != feature:
            dataset = dataset.cast_column(name, other)
    return dataset


def _undecoded(feature):
    from datasets import Image
    from datasets.features import LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


def load_dataset_of(path: str, split: str, *, streaming: bool = False):
    """Load a data set from the hub, or from a local Parquet file or folder, through ``datasets``.

    Raises:
        ModuleNotFoundError: the extra ``train`` isn't installed.
        ValueError: a file that isn't Parquet or is incomplete.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package datasets, which reads parquet and the hub; pip install "
            "'voco-kernels[train]'"
        ) from error
    is_parquet = path.lower().endswith(".parquet")
    if Path(path).is_file():
        if not is_parquet:
            raise ValueError(
                f"expected a .parquet file, a folder, or a data set of the hub, got {path}"
                + "; with data.streaming: false a .json or .jsonl is read record by record"
                * streaming
            )
        check_parquet(Path(path))
    if is_parquet:
        return load_dataset("parquet", data_files={split: path}, split=split, streaming=streaming)
    if any((Path(path) / name).is_file() for name in _SAVED):
        return _saved(path, split, streaming=streaming)
    return load_dataset(path, split=split, streaming=streaming)


_SAVED = ("state.json", "dataset_dict.json")  # written by save_to_disk; load_dataset refuses these


def _saved(path: str, split: str, *, streaming: bool):
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(path)
    if isinstance(found, DatasetDict):
        if split not in found:
            raise ValueError(
                f"expected split as one of {', '.join(found)} in {path}, got {split!r}"
            )
        found = found[split]
    return found.to_iterable_dataset() if streaming else found


def open_records(path: str, split: str = "train") -> Records:
    """Open the records of a ``.json``, ``.jsonl``, ``.ndjson``, ``.parquet``, or a data set on the hub.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind; see ``FileRecords``.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".json", *_LINES):
        return FileRecords(path)
    if Path(path).is_file() and suffix != ".parquet":
        if suffix in PACKED_SUFFIXES:
            start_of_text(Path(path))  # raises, and says how to unpack it
        raise ValueError(
            f"expected records in a .json, .jsonl, .ndjson or .parquet, got {path}; rename it by what "
            "it holds, or write it as one of these"
        )
    return DatasetRecords(load_dataset_of(path, split), path)
