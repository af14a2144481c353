"""Runs each kernel of one backend once, forward and backward, for Nsight Compute to profile.

    ncu --profile-from-start off ... python bench/profile_kernels.py --shape A --shape E

Inputs, layouts, compilation and a first run are done before the profiler is switched on, and the
backend's own functions are called: every kernel in the report is one of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.attention import direct
from bench.attention.measure import make_case
from bench.attention.peers import Case
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import SIZES
from bench.harness import options
from voco_kernels.attention import dispatch


def run(backend: str | None, case: Case) -> str:
    """Forward and backward, the second time under the profiler; the name of the backend that ran.

    Raises:
        RuntimeError: the backend can't serve.
    """
    name = direct.choose(case, backend)
    module = dispatch.load(name)

    def everything() -> None:
        out, lse = direct.forward(module, case)
        for deterministic in direct.orders(name):
            direct.backward(module, case, out, lse, deterministic=deterministic)

    everything()
    if case.device.type != "cuda":
        return name
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    everything()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    return name


app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="A shape; repeat for more.", show_default="A and E")
    ] = None,
    heads: Annotated[str, typer.Option(help="Query heads / key-value heads.")] = "32/32",
    head_dim: Annotated[int, typer.Option(help="Size of a head.", min=1)] = 128,
    backend: Annotated[
        str | None,
        typer.Option(help="A backend.", show_default="cuda_sm90, or triton, or the default"),
    ] = None,
) -> None:
    """Run one backend's kernels once a shape, between the profiler's start and stop."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    shapes = SIZES["full" if on_cuda else "tiny"].shapes
    for name in options.pick(shape or ["A", "E"], list(shapes), "shapes"):
        case = make_case(
            shapes[name],
            options.parse_heads(heads),
            head_dim,
            torch.bfloat16,
            device,
            direction=DIRECTIONS[1],
        )
        try:
            used = run(backend, case)
        except (ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from error
        print(f"{used}, shape {name} ({shapes[name].title}): forward and backward", flush=True)


if __name__ == "__main__":
    app()
