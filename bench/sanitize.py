"""Runs one backend forward and backward on small ragged layouts, and each loader of compact entries both
ways, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/sanitize.py

Inputs and layouts are made on the CPU, so that almost only our own kernels run. Whether results are
correct is for the tests to say; here they need only be finite.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.attention import direct
from bench.attention.measure import make_case
from bench.attention.peers import Case
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import Document, Shape
from bench.harness import options
from voco_kernels.attention import dispatch
from voco_kernels.kv.move import Move

HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS = (4, 2)
LOADERS = ("cuda", "triton")

_IMAGE: Document = (("vision", 130), ("voco", 3), ("text", 71))
SHAPES = (
    # rows of different lengths: the second one is padded
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
            direction=DIRECTIONS[1],
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


def loader_module(name: str) -> ModuleType:
    return import_module(f"voco_kernels.kv.loaders.{name}")


def move(loader: str, head_dim: int, device: torch.device) -> None:
    """A load that converts and rotates, and an extract: entries of 1 and 5 tokens, 3 layers.

    Raises:
        RuntimeError: the loader can't serve, or left something that is not finite.
    """
    counts, num_layers, num_heads, slots = (1, 5), 3, 3, 7
    quantized, scales, taken = [], [], []
    for count in counts:
        shape = (num_layers, 2, num_heads, count, head_dim)
        quantized.append(torch.ones(shape, dtype=torch.int8).to(device))
        scales.append(torch.ones(shape[:4]).to(device))
        taken.append(torch.full(shape, torch.nan, dtype=torch.bfloat16).to(device))
    shape = (len(counts), num_heads, slots, head_dim)
    caches = [
        [torch.full(shape, torch.nan, dtype=torch.bfloat16).to(device) for _ in range(2)]
        for _ in range(num_layers)
    ]
    counters = [torch.zeros(1, dtype=torch.int64).to(device) for _ in range(num_layers)]

    def table(rows: list) -> torch.Tensor:
        values = torch.tensor(rows)
        return values.pin_memory() if device.type == "cuda" else values

    def addresses(tensors: list[torch.Tensor]) -> list[int]:
        return [tensor.data_ptr() for tensor in tensors]

    # The one token at the last slot of row 0, the five at the first ones of row 1.
    places = [slots - 1, *(num_heads * slots + slot for slot in range(counts[1]))]
    kinds = dict(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        tokens=table([(place * head_dim, shift) for shift, place in enumerate(places)]),
        bases=table([addresses(layer) for layer in caches]),
        head_stride=slots * head_dim,
        most_tokens=max(counts),
        cache_dtype=torch.bfloat16,
        device=caches[0][0].device,
    )
    firsts = (0, counts[0])
    load = Move(
        to_cache=True,
        entries=table([*zip(addresses(quantized), addresses(scales), firsts, counts, strict=True)]),
        entry_dtype=torch.int8,
        inv_freq=(0.5 ** torch.arange(head_dim // 2).double()).to(device),
        lengths=table(addresses(counters)),
        length=slots,
        **kinds,
    )
    extract = Move(
        to_cache=False,
        entries=table([*zip(addresses(taken), (0, 0), firsts, counts, strict=True)]),
        entry_dtype=torch.bfloat16,
        **kinds,
    )
    module = loader_module(loader)
    for each in (load, extract):
        if reasons := module.missing() or module.unsupported(each):
            raise RuntimeError(f"the {loader} loader can't make this move: {'; '.join(reasons)}")
        module.run(each)
    if not all(kv.cpu().isfinite().all() for kv in taken):
        raise RuntimeError(
            f"expected finite keys and values through the {loader} loader, got others"
        )


app = options.app()


@app.command(context_settings=options.CONTEXT)
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
    """Run one backend on small ragged layouts, forward and backward; on CUDA, the loaders as well."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in head_dim or HEAD_DIMS:
        try:
            name = run(backend, size, device)
            loaders = LOADERS if device.type == "cuda" and backend is None else ()
            loaders = [loader for loader in loaders if not loader_module(loader).missing()]
            for loader in loaders:
                move(loader, size, device)
        except (ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from error
        print(f"{name}, head_dim {size}: forward and backward on {len(SHAPES)} layouts", flush=True)
        for loader in loaders:
            print(f"{loader} loader, head_dim {size}: a load and an extract", flush=True)


if __name__ == "__main__":
    app()
