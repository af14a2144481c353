"""A family of measurements: what its records look like, and the tables and pictures made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import records
from bench.harness.records import SCHEMA, STATUSES, Records
from bench.harness.text import NOT_MEASURED

Keys = dict[str, type]
Link = Callable[[str], str]
"""From the name of a file in bench/results/ to the target of a link in a text."""

_COMMON_KEYS: Keys = {
    "schema": int,
    "bench": str,
    "finished": bool,
    "environment": dict,
    "settings": dict,
}


@dataclass(frozen=True)
class Picture:
    """A plot of a record, a PNG beside it.

    Attributes:
        title: what it shows, in words.
        draw: writes the PNG of a record to a path, with metadata.
        has: whether a record has what it shows.
        suffix: what the file's name adds to the record's.
    """

    title: str
    draw: Callable[[dict, Path, dict[str, str] | None], None]
    has: Callable[[dict], bool]
    suffix: str = ""

    def path(self, record_path: Path) -> Path:
        return record_path.with_name(f"{record_path.stem}{self.suffix}.png")


@dataclass(frozen=True)
class Family:
    """What the harness and bench/report.py know of a benchmark.

    Attributes:
        name: its records' "bench".
        show: all tables of one record, as Markdown.
        record_keys, case_keys, row_keys: keys that are required, and the types of their values.
        times: keys that a row has if its status is "ok", and never otherwise.
        choices: for a key of cases or rows, the values that it may have.
        label: the words that identify a case, or a row of it, in messages.
        counts: whether a row that is wrong or failed fails the run, too.
        entries: lists in the record beside its cases, and the keys required of their entries.
        tables: for README and docs, by the name of their marker; from all records of the family.
        pictures: plots, by which a text can show a record.
    """

    name: str
    show: Callable[[dict], str]
    record_keys: Keys
    case_keys: Keys = field(default_factory=dict)
    row_keys: Keys = field(default_factory=dict)
    times: tuple[str, ...] = ("timing",)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    label: Callable[[dict, dict | None], str] = lambda case, row: ""
    counts: Callable[[dict], bool] = lambda row: True
    entries: dict[str, Keys] = field(default_factory=dict)
    tables: dict[str, Callable[[Records, Link], str]] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()

    def check(self, record: dict) -> None:
        """Raise ``ValueError`` unless ``record`` has this family's schema."""
        _check_keys(record, {**_COMMON_KEYS, **self.record_keys}, "record")
        if record["schema"] != SCHEMA:
            raise ValueError(
                f"expected schema {SCHEMA}, got {record['schema']}; run the benchmark again"
            )
        for case in record.get("cases", ()):
            _check_keys(case, self.case_keys, "case")
            where = self.label(case, None)
            self._check_choices(case, where)
            for row in case["rows"]:
                _check_keys(row, self.row_keys, f"row of {where}")
                self._check_choices(row, where)
                self._check_row(row, where)
        for name, keys in self.entries.items():
            for entry in record[name]:
                _check_keys(entry, keys, name.removesuffix("s"))

    def _check_choices(self, value: dict, where: str) -> None:
        for key, allowed in self.choices.items():
            if key in value and value[key] not in allowed:
                raise ValueError(f"expected a {key} of {allowed}, got {value[key]!r} in {where}")

    def _check_row(self, row: dict, where: str) -> None:
        status = row["status"]
        if status not in STATUSES:
            raise ValueError(f"expected a status of {STATUSES}, got {status!r} in {where}")
        timed = [key for key in self.times if key in row]
        if (status == "ok") != (len(timed) == len(self.times)):
            raise ValueError(
                f"expected a time exactly where the status is 'ok', got status {status!r} with "
                f"{timed or 'none'} for {row['name']} in {where}"
            )
        if status != "ok" and not row.get("reason"):
            raise ValueError(f"expected a reason for status {status!r} of {row['name']} in {where}")

    def write(self, record: dict, path: Path) -> None:
        """Check a record and write it.

        Raises:
            ValueError: it doesn't have this family's schema; nothing is written.
        """
        self.check(record)
        records.save(record, path)

    def failures(self, record: dict) -> list[str]:
        """A line for each thing of ours that was wrong or raised."""
        found = [
            (self.label(case, row), row) for case in record.get("cases", ()) for row in case["rows"]
        ]
        for name in self.entries:
            found += [
                (f"{name.removesuffix('s')} {entry['shape']}", entry)
                for entry in record[name]
                if "shape" in entry
            ]
        return [
            f"{label}: {row['status']}: {row['reason']}"
            for label, row in found
            if row["status"] in ("red", "failed") and self.counts(row)
        ]

    def draw(self, record: dict, record_path: Path) -> list[Path]:
        """Draw what the record has figures for, beside it; returns the files."""
        drawn = []
        for picture in self.pictures:
            if picture.has(record):
                picture.draw(record, picture.path(record_path), None)
                drawn.append(picture.path(record_path))
        return drawn


def read(path: Path, families: Iterable[Family]) -> dict:
    """A checked record of one of these families.

    Raises:
        ValueError: the file is not JSON, or no such record; the message names the file.
    """
    record = records.load(path)
    try:
        family_of(record, families).check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def family_of(record: dict, families: Iterable[Family]) -> Family:
    """
    Raises:
        ValueError: the record is of none of them.
    """
    known = {family.name: family for family in families}
    name = record.get("bench") if isinstance(record, dict) else None
    if name not in known:
        raise ValueError(f"expected a record of {' or '.join(known)}, got one of {name!r}")
    return known[name]


def picture_links(pictures: Sequence[Picture], results: Records, link: Link) -> str:
    """The pictures of all records, as Markdown images."""
    found = [
        f"![{picture.title}, {records.device_of(record)}]({link(picture.path(Path(name)).name)})"
        for name, record in results.items()
        for picture in pictures
        if picture.has(record)
    ]
    found = found or [f"{picture.title}: {NOT_MEASURED}." for picture in pictures]
    return "\n\n".join(found)


def _check_keys(value: dict, keys: Keys, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"expected a {what} as an object, got {type(value).__name__}")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            got = type(value[key]).__name__ if key in value else "nothing"
            raise ValueError(f"expected {kind.__name__} {key!r} in a {what}, got {got}")
