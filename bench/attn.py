"""Microbenchmark of ``voco_kernels.masked_attention`` against everything that a user could use instead.

    python bench/attn.py              # this machine's device, its shapes, its rivals
    python bench/attn.py --help

Each implementation is compared with float64 before it is timed; one that is wrong gets no time.
Tables go to stdout, progress to stderr, a JSON record and a plot to ``--out``.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.attention import peers
from bench.attention.questions import DIRECTIONS
from bench.attention.report import FAMILY
from bench.attention.run import AttentionRunner, pick_peers
from bench.attention.shapes import SIZES
from bench.harness import clock, options, run
from bench.harness.options import Budget, DeviceOption, Quick, Resume

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Direction(str, Enum):
    forward = "forward"
    both = "forward+backward"


class Dtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class SizeName(str, Enum):
    full = "full"
    small = "small"
    tiny = "tiny"


class Storage(str, Enum):
    tokens = "tokens"
    heads = "heads"


app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A shape, A to G (the README has them); repeat for more.", show_default="all"
        ),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            help="Query heads / key-value heads; repeat for more.",
            show_default="32/32 and 32/8; fewer on a CPU",
        ),
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Size of a head.", show_default="128; 64 on a CPU", min=1)
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of q, k and v.", show_default="bf16; fp32 on a CPU"),
    ] = None,
    direction: Annotated[
        list[Direction] | None,
        typer.Option(help="What to run; repeat for both.", show_default="both"),
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A rival; repeat for more; 'none' for none. One of: {', '.join(peers.RIVALS)}.",
            show_default="all that this machine has",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="A backend of ours, as in masked_attention(backend=...); repeat for more. Ratios "
            "are relative to the first.",
            show_default="all that can run here but the reference, this device's default first",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON record; plots are written beside it as .png.")
    ] = Path("bench-output/attn.json"),
    device: DeviceOption = options.Device.auto,
    size: Annotated[
        SizeName | None,
        typer.Option(
            help="Full-size shapes, small ones of the same structure (for a CPU), or tiny ones (a "
            "dry run).",
            show_default="full; small on a CPU",
        ),
    ] = None,
    storage: Annotated[
        Storage,
        typer.Option(
            help="Memory order of q, k and v: token after token [B, S, H, D], as projections leave "
            "them, or head after head [B, H, S, D]."
        ),
    ] = Storage.tokens,
    quick: Quick = False,
    graph: Annotated[
        bool,
        typer.Option("--graph", help="Also time replays of a CUDA graph, without host overhead."),
    ] = False,
    layouts: Annotated[
        bool, typer.Option(help="Also time building the layout, against create_block_mask.")
    ] = True,
    budget: Budget = None,
    resume: Resume = False,
) -> None:
    """Check masked_attention and its rivals against float64, then time them.

    For every shape (A to G), heads and direction: p20/p50/p80 in ms, useful TFLOP/s (computing what is
    masked earns no credit), how many times faster ours is, and the error. On CUDA, device time with a
    cold L2. Rivals named ...-parts are kernels alone: their inputs are cut beforehand and their outputs
    left apart.

    Exit status: 0; 1 if a backend of ours was wrong or failed; 2 for wrong usage; 3 if a kernel broke
    the CUDA context (run the same command again with --resume: the kernel at fault keeps its row, as
    failed).
    """
    torch_device = options.pick_device(device)
    on_cuda = torch_device.type == "cuda"
    chosen_size = (size or (SizeName.full if on_cuda else SizeName.small)).value
    chosen = SIZES[chosen_size]
    dtype_name = (dtype or (Dtype.bf16 if on_cuda else Dtype.fp32)).value
    shapes = [chosen.shapes[name] for name in options.pick(shape, list(chosen.shapes), "shapes")]
    all_heads = [options.parse_heads(text) for text in heads or []] or list(chosen.heads)
    directions = options.pick([each.value for each in direction or []], DIRECTIONS, "directions")
    width = head_dim or chosen.head_dim
    probe = torch.empty(1, 1, 1, width, dtype=DTYPES[dtype_name], device=torch_device)
    present, unavailable = pick_peers(probe, backend or [], rival or [])
    settings = {
        "size": chosen_size,
        "shapes": [entry.name for entry in shapes],
        "heads": [list(pair) for pair in all_heads],
        "head_dim": width,
        "dtype": dtype_name,
        "directions": directions,
        "storage": storage.value,
        "quick": quick,
        "peers": {peer.name: peer.legend for peer in present},
    }
    record = run.fresh(
        FAMILY,
        torch_device,
        settings,
        ceilings={},
        unavailable=unavailable,
        cases=[],
        layouts=[],
    )
    if resume:
        with options.usage_errors():
            record = run.resumed(out, record, FAMILY)
    runner = AttentionRunner(
        record=record,
        out=out,
        device=torch_device,
        budget=budget,
        dtype=DTYPES[dtype_name],
        head_dim=width,
        storage=storage.value,
        present=present,
        shapes=shapes,
        heads=all_heads,
        directions=directions,
        effort=(clock.QUICK if quick else clock.FULL)[torch_device.type],
        graph=graph,
        layouts=layouts,
    )
    run.finish(runner)


if __name__ == "__main__":
    app()
