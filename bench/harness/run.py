"""A run of a benchmark: a record that fills up within a budget, and what is said at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import typer

from bench.harness import guard, machine, text
from bench.harness.family import Family, read
from bench.harness.guard import DeviceLostError
from bench.harness.options import EXIT_DEVICE_LOST, EXIT_RED
from bench.harness.progress import ProgressReport
from bench.harness.records import SCHEMA


def fresh(
    family: Family,
    device: torch.device,
    settings: dict,
    sources: Sequence[str] = machine.SOURCES,
    **more: dict | list,
) -> dict:
    """A record in which nothing was measured yet.

    Args:
        sources: folders of the code that is timed.
        more: its further entries.
    """
    return {
        "schema": SCHEMA,
        "bench": family.name,
        "finished": False,
        "environment": machine.environment(device, sources),
        "settings": settings,
        **more,
    }


def resumed(path: Path, new: dict, family: Family) -> dict:
    """The record at ``path``, to be continued, without its skipped rows; ``new`` if there is none.

    Raises:
        ValueError: it was made with other settings or other sources.
    """
    if not path.exists():
        return new
    before = read(path, [family])
    for key in ("settings", "unavailable"):
        if before.get(key) != new.get(key):
            raise ValueError(
                f"expected {path} with the same {key} to resume, got {before[key]} instead of "
                f"{new[key]}; remove it or leave out --resume"
            )
    if before["environment"]["sources_sha256"] != new["environment"]["sources_sha256"]:
        raise ValueError(
            f"expected {path} of the same sources to resume, got one of others; remove it or leave out "
            "--resume"
        )
    holders = [(case, "rows") for case in before.get("cases", ())]
    for holder, key in [*holders, *((before, name) for name in family.entries)]:
        holder[key] = [row for row in holder[key] if row["status"] != "skipped"]
    return before | {"finished": False}


@dataclass(kw_only=True)
class Runner:
    """Base of all runs. A subclass writes ``fill``.

    Attributes:
        family: what the record is checked against.
        out_of_memory: the status of a row whose measurement runs out of memory.
        record: written to ``out`` as it grows.
        budget: seconds after which nothing new starts; None for no limit.
        started: when they began, on the clock of ``time.monotonic``.
    """

    family: ClassVar[Family]
    out_of_memory: ClassVar[str] = "failed"
    record: dict
    out: Path
    device: torch.device
    budget: float | None = None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Fill the record.

        Raises:
            DeviceLostError: a kernel broke the CUDA context. What was measured before, and the culprit's
                row, are in the record; another process can continue it.
        """
        self.write()
        self.fill()
        self.record["finished"] = True
        self.write()

    def fill(self) -> None:
        """Measure everything, calling ``write`` as often as losing the rest would hurt."""
        raise NotImplementedError

    def write(self) -> None:
        self.family.write(self.record, self.out)

    @property
    def deadline(self) -> float:
        """On the clock of ``time.monotonic``; infinite without a budget."""
        return math.inf if self.budget is None else self.started + self.budget

    def spent(self) -> str:
        """Why no measurement may start any more; empty while there is time."""
        if time.monotonic() <= self.deadline:
            return ""
        return f"the budget of {self.budget:g} s was spent"

    @contextmanager
    def progress_of(self, total: int, done: int = 0) -> Iterator[None]:
        """Show progress meanwhile; ``measure`` counts."""
        self.progress = ProgressReport(total, done)
        with self.progress.shown():
            yield

    def attempt(self, function: Callable[[], dict]) -> dict:
        """``guard.outcome`` with this run's status for running out of memory."""
        return guard.outcome(function, out_of_memory=self.out_of_memory)

    def measure(
        self,
        what: str,
        head: dict,
        function: Callable[[], dict],
        rows: list[dict],
        *,
        order: Sequence[str] = (),
        write: bool = True,
    ) -> dict:
        """Measure one row, however it goes, and put it into ``rows``.

        Args:
            what: the row in words.
            head: what the row has in any case.
            function: measures; returns the rest of the row. Not called once the budget is spent.
            order: names in the order that ``rows`` keep; by default that of measuring.
            write: whether to write the record, too; after a failure it always is.

        Raises:
            DeviceLostError: see ``run``.
        """

        def row() -> dict:
            reason = self.spent()
            if reason:
                return {**head, "status": "skipped", "reason": reason}
            return {**head, **self.attempt(function)}

        made = self.progress.measure(what, row, self.say)
        rows.append(made)
        if order:
            rows.sort(key=lambda row: order.index(row["name"]))
        try:
            guard.check_device(self.device, what, made)
        finally:
            if write or made["status"] == "failed":
                self.write()
        return made

    def say(self, row: dict) -> str:
        """A row's outcome in words, for progress."""
        if row["status"] != "ok":
            return f"{row['status']}: {row['reason']}"
        return f"{row['timing']['p50']:.4g} ms"


def finish(runner: Runner) -> None:
    """Run, then print the tables, draw the plots and say what was wrong.

    Raises:
        typer.Exit: a kernel broke the CUDA context, or something of ours was wrong or failed.
    """
    try:
        runner.run()
    except DeviceLostError as lost:
        print(lost, file=sys.stderr)
        raise typer.Exit(EXIT_DEVICE_LOST) from lost
    family, record = runner.family, runner.record
    print(text.aligned(family.show(record)))
    drawn = family.draw(record, runner.out)
    print(f"wrote {', '.join(map(str, [runner.out, *drawn]))}")
    wrong = family.failures(record)
    for line in wrong:
        print(f"RED {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(EXIT_RED)
