"""Forward and backward of one backend on small ragged layouts, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/sanitize.py

Inputs and layouts are made on the CPU, so that hardly a kernel runs but the backend's own. Whether
results are right is the tests' affair; here they need only be finite.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench import direct, records
from bench.measure import make_case
from bench.peers import Case
from bench.shapes import Document, Shape
from voco_kernels import dispatch

HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS = (4, 2)

_IMAGE: Document = (("vision", 130), ("voco", 3), ("text", 71))
SHAPES = (
    # rows of different length: padding behind the second one
    Shape("rows", "one image; text alone, padded", (_IMAGE, (("text", 65),))),
    Shape(
        "images",
        "isolated images, more than a block of gathered keys",
        ((("vision", 37), ("voco", 9)) * 9 + (("text", 150),),),
        isolated=True,
    ),
    Shape("packed", "documents of any length", (_IMAGE, (("text", 1),), _IMAGE[:2]), packed=True),
)


def run(backend: str | None, head_dim: int, device: torch.device) -> str:
    """Every shape, forward and backward; the name of the backend that ran.

    Raises:
        RuntimeError: the backend can't serve, or gave something that is not finite.
    """
    for shape in SHAPES:
        host = make_case(
            shape,
            HEADS,
            head_dim,
            torch.bfloat16,
            torch.device("cpu"),
            direction=records.DIRECTIONS[1],
        )
        tensors = (getattr(host, name).to(device) for name in ("q", "k", "v", "dout"))
        case = Case(shape, host.layout.to(device), *tensors, backward=True)
        name = direct.choose(case, backend)
        module = dispatch.load(name)
        out, lse = direct.forward(module, case)
        results = {"out": out}
        for deterministic in direct.orders(name):
            dlse = None if deterministic else torch.zeros_like(lse)
            gradients = direct.backward(module, case, out, lse, dlse, deterministic)
            results |= zip(("dq", "dk", "dv"), gradients, strict=True)
            for what, result in results.items():
                if not result.cpu().isfinite().all():
                    raise RuntimeError(
                        f"expected finite values in {what} of {name} on {shape.title}, head_dim "
                        f"{head_dim}, deterministic={deterministic}; got others"
                    )
    return name


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    backend: Annotated[
        str | None,
        typer.Option(help="A backend.", show_default="cuda_sm90, or triton, or the default"),
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(help="Size of a head; repeat for more.", show_default="64 80 96 128 256"),
    ] = None,
) -> None:
    """Run one backend on small ragged layouts, forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in head_dim or HEAD_DIMS:
        try:
            name = run(backend, size, device)
        except (ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from error
        print(f"{name}, head_dim {size}: forward and backward on {len(SHAPES)} layouts", flush=True)


if __name__ == "__main__":
    app()
