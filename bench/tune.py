"""Times the Triton kernels with one block shape after another, and writes the package's table.

    python bench/tune.py --out tune.json             # on a GPU: measure and choose
    python bench/tune.py --from tune.json --write    # anywhere: put the choices into the table
    python bench/tune.py --dry-run                   # on a CPU: the same path, interpreted, tiny

A user's first call never tunes: it looks into ``voco_kernels/attention/backends/triton/table.py``,
which this script writes. Each candidate is compiled first; one that spills or does not fit into shared
memory is dropped. Each is compared with float64 before it is timed. The smallest geometric mean over the
shapes is chosen. dQ and dK/dV are timed as parts of the whole backward pass.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install
    if "--dry-run" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is now

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from bench.attention import direct, measure, oracle
from bench.attention.peers import Case
from bench.attention.run import ProgressReport
from bench.attention.shapes import SIZES, Shape
from bench.attn import EXIT_DEVICE_LOST, parse_heads, pick
from bench.harness import clock as timing
from bench.harness import records
from bench.tuning import candidates, trial
from bench.tuning.trial import Job
from voco_kernels.attention.backends import triton
from voco_kernels.attention.backends.triton import table as triton_table
from voco_kernels.attention.backends.triton.config import chip_of

SCHEMA = 1
SHAPE_ORDER = "AECFDGB"
"""Short and long rows by turns: a budget that is spent early leaves a mix of them."""

EFFORT = {"cuda": timing.QUICK["cuda"], "cpu": timing.Effort(0, 1, 1)}


@dataclass
class Tuner:
    """What to try, and the record that fills up.

    Attributes:
        record: written to ``out`` as it grows. ``candidates``: a row each, ``ok``, ``dropped`` (with
            the reason) or ``skipped`` (not reached). ``timings``: a row for each candidate and shape,
            with a status as in ``bench.records``. ``choices``: see ``candidates.choose``.
        jobs: the candidates; of a kernel and width the shipped one first.
        budget: seconds after which nothing new starts; None for no limit.
    """

    record: dict
    out: Path
    device: torch.device
    chip: int
    heads: tuple[int, int]
    shapes: list[Shape]
    jobs: list[Job]
    budget: float | None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Fill the record.

        Raises:
            measure.DeviceLostError: a candidate broke the CUDA context; the record is written, with
                that candidate as failed, and another process can go on with it.
        """
        for width in dict.fromkeys(width for _, width, _ in self.jobs):
            jobs = [job for job in self.jobs if job[1] == width]
            self._try_out(jobs)
            alive = [job for job in jobs if self._row_of(job)["status"] == "ok"]
            done = sum(row["width"] == width for row in self.record["timings"])
            self.progress = ProgressReport(len(alive) * len(self.shapes), done)
            with self.progress.shown():
                for shape in self.shapes:
                    self._time_shape(shape, width, alive)
        self.record["choices"] = candidates.choose(self.record)
        self.record["finished"] = True
        records.save(self.record, self.out)

    def _try_out(self, jobs: list[Job]) -> None:
        todo = [job for job in jobs if self._row_of(job) is None]
        deadline = math.inf if self.budget is None else self.started + self.budget
        rows = trial.try_all(todo, self.heads, self.chip, self.device, deadline)
        for job in todo:
            if job not in rows:
                kernel, width, blocks = job
                rows[job] = {"kernel": kernel, "width": width, "blocks": list(blocks)}
                rows[job] |= {"status": "skipped", "reason": self._spent_reason()}
            self.record["candidates"].append(rows[job])
        records.save(self.record, self.out)

    def _row_of(self, job: Job, shape: Shape | None = None) -> dict | None:
        """The candidate's row; with a shape, its timing."""
        kernel, width, blocks = job
        wanted = {"kernel": kernel, "width": width, "blocks": list(blocks)}
        if shape is not None:
            wanted["shape"] = shape.name
        rows = self.record["candidates" if shape is None else "timings"]
        return next((row for row in rows if wanted.items() <= row.items()), None)

    def _time_shape(self, shape: Shape, width: int, jobs: list[Job]) -> None:
        """All kernels and candidates of a width on one shape."""
        todo = [job for job in jobs if self._row_of(job, shape) is None]
        if not todo:
            return
        case, truth, result, reason = None, None, None, self._spent_reason()
        if not reason:
            try:
                direction, dtype = records.DIRECTIONS[1], torch.bfloat16
                case = measure.make_case(
                    shape, self.heads, width, dtype, self.device, direction=direction
                )
                truth = measure.truth_of(case)
                result = direct.forward(triton, case)
            except Exception as error:  # no candidate's fault: the other shapes decide
                reason = f"no inputs or no float64 truth: {timing.first_line(error)}"
        for job in todo:
            kernel, _, blocks = job
            head = {
                "name": f"{kernel} {width} {blocks}",
                "kernel": kernel,
                "width": width,
                "blocks": list(blocks),
                "shape": shape.name,
            }

            def row_of(head=head, job=job) -> dict:
                skipped = reason or self._spent_reason()
                if skipped:
                    return {**head, "status": "skipped", "reason": skipped}
                return {**head, **self._check_and_time(job, case, truth, result)}

            try:
                row = self.progress.measure(f"{shape.name} {head['name']}", row_of)
            except measure.DeviceLostError as lost:
                self.record["timings"].append({**head, **lost.row})
                records.save(self.record, self.out)
                raise
            self.record["timings"].append(row)
        records.save(self.record, self.out)
        if self.device.type == "cuda":
            del case, truth, result
            torch.cuda.empty_cache()

    def _check_and_time(
        self,
        job: Job,
        case: Case,
        truth: oracle.Truth,
        result: tuple[torch.Tensor, torch.Tensor],
    ) -> dict:
        def run() -> dict[str, torch.Tensor]:
            if job[0] == "forward":
                return {"out": direct.forward(triton, case)[0]}
            gradients = direct.backward(triton, case, *result)
            return dict(zip(oracle.NAMES[1:], gradients, strict=True))

        with trial.using(job, self.chip):
            try:
                measure.poison(case)
                errors = truth.check(run(), case.k.shape[1])
                if not oracle.within_limits(errors):
                    listed = ", ".join(f"{n} {e['error']:.2e}" for n, e in errors.items())
                    reason = f"error against fp64: {listed}; not timed"
                    return {"status": "red", "reason": reason, "errors": errors}
                measured = timing.measure(run, self.device, EFFORT[self.device.type])
                return {"status": "ok", "timing": measured.to_json(), "errors": errors}
            except Exception as error:  # the row says what broke; the other candidates go on
                row = {"status": "failed", "reason": timing.first_line(error)}
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise measure.DeviceLostError({"name": f"{job}", **row}) from error
        return row

    def _spent_reason(self) -> str:
        if self.budget is None or time.monotonic() - self.started <= self.budget:
            return ""
        return f"the budget of {self.budget:g} s was spent"


def read(path: Path) -> dict:
    """A record of this script.

    Raises:
        ValueError: it is none, or one of another schema.
    """
    record = records.load(path)
    if record.get("bench") != "tune" or record.get("schema") != SCHEMA:
        raise ValueError(
            f"expected a record of bench/tune.py with schema {SCHEMA} in {path}, got one of "
            f"{record.get('bench')!r} with schema {record.get('schema')}"
        )
    return record


def resumed(path: Path, fresh: dict) -> dict:
    """The record at ``path`` to go on with, or the fresh one where there is none.

    Raises:
        ValueError: that record is of other settings or other sources.
    """
    if not path.exists():
        return fresh
    before = read(path)
    same = before["settings"] == fresh["settings"]
    digests = [record["environment"]["sources_sha256"] for record in (before, fresh)]
    if not same or digests[0] != digests[1]:
        raise ValueError(
            f"expected {path} of the same settings and sources to resume, got others; remove it or "
            "leave out --resume"
        )
    for key in ("candidates", "timings"):
        before[key] = [row for row in before[key] if row["status"] != "skipped"]
    return before | {"finished": False}


def show(record: dict, console: Console) -> None:
    """What was chosen, and what was dropped and why."""
    device = escape(record["environment"]["device"]["name"])
    table = RichTable(
        title=f"Triton on {device}, sm_{record['settings']['chip']}",
        title_justify="left",
        caption="blocks: queries, keys, warps, stages; ms: geometric mean over the shapes, of the "
        "whole backward pass for dq and dkdv; x: how many times faster than what ships",
        caption_justify="left",
    )
    for name in ("kernel", "head_dim", "blocks", "ms", "x", "shapes"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for choice in record["choices"]:
        gain = choice["times_shipped"]
        table.add_row(
            choice["kernel"],
            str(choice["width"]),
            ", ".join(map(str, choice["blocks"])),
            f"{choice['mean_ms']:.4g}",
            "-" if gain is None else f"{gain:.3f}",
            "".join(choice["shapes"]),
        )
    console.print(table)
    for row in record["candidates"]:
        if row["status"] != "ok":
            what = f"{row['kernel']} {row['width']} {tuple(row['blocks'])}"
            console.print(f"{row['status']}: {what}: {escape(row['reason'])}", soft_wrap=True)
    for status in ("skipped", "red", "failed"):
        rows = [row for row in record["timings"] if row["status"] == status]
        if rows:
            first = escape(rows[0]["reason"])
            console.print(f"{status}: {len(rows)} timings, the first: {first}", soft_wrap=True)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    head_dim: Annotated[
        list[int] | None,
        typer.Option(
            help="A class of head_dim, 64, 128 or 256; repeat for more.", show_default="all"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A shape, A to G; repeat for more.", show_default="all"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Query heads / key-value heads.", show_default="32/32"),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option(help="Candidates a kernel and head_dim.", show_default="all", min=1),
    ] = None,
    out: Annotated[Path, typer.Option(help="The JSON record.")] = Path("bench-output/tune.json"),
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which nothing new starts; the rest is recorded as skipped.",
            show_default="none",
            min=0,
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the choices into the table.")
    ] = False,
    table: Annotated[
        Path, typer.Option(help="The table that --write writes.", show_default="the package's")
    ] = candidates.TABLE_FILE,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: choose from this record.", exists=True),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the record at --out: rows that are there stay."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="On a CPU, interpreted: tiny shapes, two candidates each."),
    ] = False,
) -> None:
    """Choose the Triton kernels' block shapes for this GPU.

    Exit status: 0; 2 wrong usage; 3 if a candidate broke the CUDA context (run the same again with
    --resume: the culprit's row is kept, as failed).
    """
    if write and dry_run and table == candidates.TABLE_FILE:
        raise typer.BadParameter(
            "expected another --table to --write in a --dry-run, got the package's own; name a file"
        )
    try:
        if source is not None:
            record = read(source)
            record["choices"] = candidates.choose(record)
        else:
            record = _measure(head_dim, shape, heads, most, out, budget, resume, dry_run)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except measure.DeviceLostError as lost:
        print(lost, file=sys.stderr)
        raise typer.Exit(EXIT_DEVICE_LOST) from lost
    if write and record["settings"]["dry_run"] and table == candidates.TABLE_FILE:
        raise typer.BadParameter(
            "expected another --table to --write a --dry-run's choices, got the package's own; name "
            "a file"
        )
    show(record, Console(width=None if sys.stdout.isatty() else 160))
    if source is None:
        print(f"wrote {out}")
    if write:
        new = candidates.updated_table(triton_table.TABLE, record)
        table.write_text(candidates.table_text(new))
        print(f"wrote {table}")


def _measure(
    head_dims: list[int] | None,
    shapes: list[str] | None,
    heads: str | None,
    most: int | None,
    out: Path,
    budget: float | None,
    resume: bool,
    dry_run: bool,
) -> dict:
    """Run the tuner; returns its record."""
    missing = triton.missing()
    if missing or torch.cuda.is_available() == dry_run:
        why = "; ".join(missing) or "a CUDA device, which the interpreter has no use for"
        where = "the CPU alone, with Triton, for" if dry_run else "a CUDA device without"
        raise ValueError(f"expected {where} --dry-run, got: {why}")
    size = SIZES["tiny" if dry_run else "full"]
    names = pick(shapes or (["A"] if dry_run else []), list(size.shapes), "shapes")
    widths = head_dims or ([64] if dry_run else list(candidates.WIDTHS))
    if not set(widths) <= set(candidates.WIDTHS):
        raise ValueError(f"expected --head-dim of 64, 128 or 256, got {widths}")
    num_heads = parse_heads(heads) if heads else (2, 1) if dry_run else size.heads[0]
    most = most or (2 if dry_run else None)
    if dry_run:
        from tests.support.triton_interpreter import repair

        repair()  # bfloat16, which Triton's own interpreter multiplies as integers
        device, chip = torch.device("cpu"), 80  # what the backend takes for a CPU
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        chip = chip_of(10 * major + minor)
    record = {
        "schema": SCHEMA,
        "bench": "tune",
        "finished": False,
        "environment": timing.environment(device),
        "settings": {
            "chip": chip,
            "widths": widths,
            "shapes": names,
            "heads": list(num_heads),
            "dtype": "bf16",
            "most": most,
            "dry_run": dry_run,
        },
        "candidates": [],
        "timings": [],
        "choices": [],
    }
    if resume:
        record = resumed(out, record)
    Tuner(
        record=record,
        out=out,
        device=device,
        chip=chip,
        heads=num_heads,
        shapes=[size.shapes[name] for name in SHAPE_ORDER if name in names],
        jobs=[
            (kernel, width, blocks)
            for width in widths
            for kernel in candidates.KERNELS
            for blocks in candidates.candidates_for(kernel, width, chip, most)
        ],
        budget=budget,
    ).run()
    return record


if __name__ == "__main__":
    app()
