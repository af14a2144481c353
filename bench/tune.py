"""Times the Triton kernels with candidate block shapes, and writes the package's table of the fastest.

    python bench/tune.py --out tune.json             # on a GPU: measure and choose
    python bench/tune.py --from tune.json --write    # anywhere: put the choices into the table
    python bench/tune.py --dry-run                   # on a CPU: the same path, interpreted, tiny

A user's first call never tunes: it reads ``voco_kernels/attention/backends/triton/table.py``,
which this script writes. Each candidate is compiled first; one that spills or does not fit into shared
memory is dropped. Each is compared with float64 before it is timed. The smallest geometric mean over the
shapes is chosen. dQ and dK/dV are timed as parts of the whole backward pass.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install
    if "--dry-run" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is now

import torch
import typer

from bench.attention.shapes import SIZES
from bench.harness import family, options, run, text
from bench.harness.options import Budget, Resume
from bench.tuning import candidates
from bench.tuning.report import FAMILY, show
from bench.tuning.run import Tuner
from voco_kernels.attention.backends import triton
from voco_kernels.attention.backends.triton import table as triton_table
from voco_kernels.attention.backends.triton.config import chip_of

SHAPE_ORDER = "AECFDGB"
"""Short and long rows alternate: a budget that is spent early leaves a mix of them."""

app = options.app()


@app.command(context_settings=options.CONTEXT)
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
        typer.Option(help="Candidates per kernel and head_dim.", show_default="all", min=1),
    ] = None,
    out: Annotated[Path, typer.Option(help="The JSON record.")] = Path("bench-output/tune.json"),
    budget: Budget = None,
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
    resume: Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="On a CPU, interpreted: tiny shapes, two candidates each."),
    ] = False,
) -> None:
    """Choose the Triton kernels' block shapes for this GPU.

    Exit status: 0; 2 for wrong usage; 3 if a candidate broke the CUDA context (run the same command
    again with --resume: that candidate keeps its row, as failed).
    """
    if source is not None:
        with options.usage_errors():
            record = family.read(source, [FAMILY])
        record["choices"] = candidates.choose(record)
    is_dry = dry_run if source is None else record["settings"]["dry_run"]
    if write and is_dry and table == candidates.TABLE_FILE:
        raise typer.BadParameter(
            "expected another --table to --write a --dry-run's choices, got the package's own; name "
            "a file"
        )
    if source is not None:
        print(text.aligned(show(record)))
    else:
        with options.usage_errors():
            tuner = _tuner(head_dim, shape, heads, most, out, budget, resume, dry_run)
        run.finish(tuner)
        record = tuner.record
    if write:
        new = candidates.updated_table(triton_table.TABLE, record)
        table.write_text(candidates.table_text(new))
        print(f"wrote {table}")


def _tuner(
    head_dims: list[int] | None,
    shapes: list[str] | None,
    heads: str | None,
    most: int | None,
    out: Path,
    budget: float | None,
    resume: bool,
    dry_run: bool,
) -> Tuner:
    missing = triton.missing()
    if missing or torch.cuda.is_available() == dry_run:
        why = "; ".join(missing) or "a CUDA device, which the interpreter has no use for"
        where = "the CPU alone, with Triton, for" if dry_run else "a CUDA device without"
        raise ValueError(f"expected {where} --dry-run, got: {why}")
    size = SIZES["tiny" if dry_run else "full"]
    names = options.pick(shapes or (["A"] if dry_run else []), list(size.shapes), "shapes")
    widths = head_dims or ([64] if dry_run else list(candidates.WIDTHS))
    if not set(widths) <= set(candidates.WIDTHS):
        raise ValueError(f"expected --head-dim of 64, 128 or 256, got {widths}")
    num_heads = options.parse_heads(heads) if heads else (2, 1) if dry_run else size.heads[0]
    most = most or (2 if dry_run else None)
    if dry_run:
        from tests.support.triton_interpreter import repair

        repair()  # bfloat16, which Triton's own interpreter multiplies as integers
        device, chip = torch.device("cpu"), 80  # what the backend takes for a CPU
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        chip = chip_of(10 * major + minor)
    settings = {
        "chip": chip,
        "widths": widths,
        "shapes": names,
        "heads": list(num_heads),
        "dtype": "bf16",
        "most": most,
        "dry_run": dry_run,
    }
    record = run.fresh(FAMILY, device, settings, candidates=[], timings=[], choices=[])
    if resume:
        record = run.resumed(out, record, FAMILY)
    return Tuner(
        record=record,
        out=out,
        device=device,
        budget=budget,
        chip=chip,
        heads=num_heads,
        shapes=[size.shapes[name] for name in SHAPE_ORDER if name in names],
        jobs=[
            (kernel, width, blocks)
            for width in widths
            for kernel in candidates.KERNELS
            for blocks in candidates.candidates_for(kernel, width, chip, most)
        ],
    )


if __name__ == "__main__":
    app()
