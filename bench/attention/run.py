"""A whole run of ``bench/attn.py``: every shape, heads, direction and peer, into one record.

What matters most comes first. Peers that compile for each case, or take far longer than their
worth, are left to a second pass over all cases, and layouts to the end: a run that is cut off has
the rest.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.attention import measure
from bench.attention.peers import Peer
from bench.attention.shapes import Shape
from bench.harness import clock as timing
from bench.harness import records


class ProgressReport:
    """Progress on stderr: a bar on a terminal, a line for each measurement elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self.console = Console(stderr=True)
        self.total, self.done = total, done
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task("", total=total, completed=done)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self.progress:
            yield

    def measure(self, what: str, function: Callable[[], dict]) -> dict:
        """Run one measurement under its name; returns what it returns."""
        self.progress.update(self.task, description=what)
        row = function()
        self.done += 1
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            line = f"[{self.done}/{self.total}] {what}: {_outcome(row)}"
            print(line, file=sys.stderr, flush=True)
        return row


def _outcome(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    if "tflops" in row:
        return f"{row['timing']['p50']:.4g} ms, {row['tflops']:.4g} useful TFLOP/s"
    timing = row["layout"] if "layout" in row else row["timing"]
    return f"{timing['p50']:.4g} ms"


@dataclass
class Runner:
    """What to run, how, and the record that fills up.

    Attributes:
        record: see ``records``; written to ``out`` after every case.
        present: peers in the order of the tables; ours first.
        shapes, heads, directions: each combination is a case.
        budget: seconds after which no measurement starts; None for no limit.
    """

    record: dict
    out: Path
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    storage: str
    present: list[Peer]
    shapes: list[Shape]
    heads: list[tuple[int, int]]
    directions: list[str]
    effort: timing.Effort
    graph: bool
    layouts: bool
    budget: float | None

    def run(self) -> None:
        """Fill the record.

        Raises:
            measure.DeviceLostError: a kernel broke the CUDA context; the record is written, the
                culprit's row in it, and another process can go on with it.
        """
        self.started = time.monotonic()
        cases = [
            (direction, heads, shape)
            for direction in self.directions
            for heads in self.heads
            for shape in self.shapes
        ]
        total = len(cases) * len(self.present) + (len(self.shapes) if self.layouts else 0)
        done = [row for case in self.record["cases"] for row in case["rows"]]
        self.progress = ProgressReport(total, len(done) + len(self.record["layouts"]))
        with self.progress.shown():
            self._measure_ceilings()
            for slow in (False, True):
                for case in cases:
                    self._run_case(*case, slow=slow)
            for shape in self.shapes if self.layouts else []:
                self._run_layout(shape)
        self.record["finished"] = True
        records.write(self.record, self.out)

    def _measure_ceilings(self) -> None:
        if self.record["ceilings"]:
            return
        try:
            self.record["ceilings"] = timing.ceilings(self.device, self.dtype, self.effort)
        except RuntimeError as error:  # a table without its ceilings is better than no table
            reason = timing.first_line(error)
            self.record["environment"]["no_ceilings"] = reason
            print(f"no ceilings: {reason}", file=sys.stderr)

    def _run_case(
        self, direction: str, heads: tuple[int, int], shape: Shape, *, slow: bool
    ) -> None:
        entry = self._entry(measure.case_record(shape, heads, self.head_dim, self.dtype, direction))
        done = {row["name"] for row in entry["rows"]}
        todo = [
            peer
            for peer in self.present
            if peer.name not in done and peer.slow(shape, self.device) == slow
        ]
        if not todo:
            return
        measure_row = self._measure_row(direction, heads, shape, entry["flops"])
        order = [peer.name for peer in self.present]
        for peer in todo:
            what = f"{direction} {shape.name} {heads[0]}/{heads[1]} {peer.name}"
            try:
                row = self.progress.measure(what, partial(measure_row, peer))
            except measure.DeviceLostError as lost:
                entry["rows"].append(lost.row)
                records.write(self.record, self.out)
                raise
            entry["rows"].append(row)
            entry["rows"].sort(key=lambda row: order.index(row["name"]))
            records.write(self.record, self.out)
        del measure_row
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _measure_row(
        self, direction: str, heads: tuple[int, int], shape: Shape, flops: int
    ) -> Callable[[Peer], dict]:
        """The inputs of a case and its truth, as a function that measures a peer on them."""
        reason = self._spent_reason()
        if not reason:
            try:
                case = measure.make_case(
                    shape,
                    heads,
                    self.head_dim,
                    self.dtype,
                    self.device,
                    direction=direction,
                    storage=self.storage,
                )
                truth = measure.truth_of(case)
            except Exception as error:  # without a truth nothing is timed; other cases go on
                reason = f"no inputs or no float64 truth: {timing.first_line(error)}"
                return lambda peer: measure.empty_row(peer, "failed", reason)

        def row_of(peer: Peer) -> dict:
            reason = self._spent_reason()
            if reason:
                return measure.empty_row(peer, "skipped", reason)
            return measure.measure_peer(peer, case, truth, flops, self.effort, graph=self.graph)

        return row_of

    def _entry(self, found: dict) -> dict:
        """The record's case of this shape, heads and direction; the one that was found if new."""
        keys = ("shape", "direction", "num_heads", "num_kv_heads")
        for known in self.record["cases"]:
            if all(known[key] == found[key] for key in keys):
                return known
        self.record["cases"].append(found)
        return found

    def _run_layout(self, shape: Shape) -> None:
        if shape.name in [entry["shape"] for entry in self.record["layouts"]]:
            return
        on_gpu = self.device.type == "cuda"

        def entry_of() -> dict:
            reason = self._spent_reason()
            if reason:
                return {"shape": shape.name, "status": "skipped", "reason": reason}
            return measure.measure_layout(shape, self.device, self.effort, compiled=on_gpu)

        entry = self.progress.measure(f"layout {shape.name}", entry_of)
        self.record["layouts"].append(entry)
        records.write(self.record, self.out)

    def _spent_reason(self) -> str:
        """Why no measurement may start any more; empty while there is time."""
        if self.budget is None or time.monotonic() - self.started <= self.budget:
            return ""
        return f"the budget of {self.budget:g} s was spent"
