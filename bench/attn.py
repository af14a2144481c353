"""Microbenchmark of ``voco_kernels.masked_attention`` against everything a user could reach for
instead.

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
from rich.console import Console

from bench.attention import peers, plots, tables
from bench.attention.measure import DeviceLostError
from bench.attention.peers import Peer
from bench.attention.run import Runner
from bench.attention.shapes import SIZES
from bench.harness import clock as timing
from bench.harness import records

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EXIT_RED = 1
EXIT_DEVICE_LOST = 3


class Device(str, Enum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


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


def parse_heads(text: str) -> tuple[int, int]:
    """``"32/8"`` -> ``(32, 8)``.

    Raises:
        typer.BadParameter: not two positive integers, the second a divisor of the first.
    """
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() and int(part) > 0 for part in parts):
        num_heads, num_kv_heads = map(int, parts)
        if num_heads % num_kv_heads == 0:
            return num_heads, num_kv_heads
    raise typer.BadParameter(
        f"expected heads as 32/8, key/value heads dividing heads, got {text!r}"
    )


def pick(names: list[str], known: list[str], what: str) -> list[str]:
    """The named ones, or all; an unknown name is an error that lists the known ones."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"expected {what} among {', '.join(known)}, got {', '.join(unknown)}"
        )
    return [name for name in known if name in names] if names else known


def pick_device(device: Device) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise typer.BadParameter(
            "expected a CUDA device for --device cuda, got none; use --device cpu"
        )
    on_cuda = has_cuda and device is not Device.cpu
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def pick_peers(
    probe: torch.Tensor, backends: list[str], rivals: list[str]
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that this machine has, ours first, and the other ones with their reasons.

    Args:
        probe: a small q, of the device, dtype and head_dim that will be run.
        backends: names of ours; all but the reference if empty.
        rivals: names; all if empty, none if ``["none"]``.
    """
    device = probe.device
    names = [] if rivals == ["none"] else pick(rivals, list(peers.RIVALS), "rivals")
    try:
        chosen = [*peers.ours(probe, backends), *(peers.RIVALS[name] for name in names)]
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if not rivals:  # a rival of another device is news only to those who asked for it
        chosen = [peer for peer in chosen if peer.device_type in (None, device.type)]
    present, unavailable = [], {}
    for peer in chosen:
        try:
            reason = peer.missing(device)
        except Exception as error:  # a broken package must not end the run; its reason is recorded
            reason = timing.first_line(error)
        if reason is None:
            present.append(peer)
        else:
            unavailable[peer.name] = reason
    if not any(peer.ours for peer in present):
        raise typer.BadParameter(f"no backend of ours can run on {device}: {unavailable}")
    return present, unavailable


def resumed(path: Path, fresh: dict) -> dict:
    """The record at ``path`` to go on with, or the fresh one where there is none.

    Raises:
        typer.BadParameter: that record is of other settings or other sources.
    """
    if not path.exists():
        return fresh
    before = records.read(path)
    for key in ("settings", "unavailable"):
        if before[key] != fresh[key]:
            raise typer.BadParameter(
                f"expected {path} with the same {key} to resume, got {before[key]} for {fresh[key]}"
            )
    if before["environment"]["sources_sha256"] != fresh["environment"]["sources_sha256"]:
        raise typer.BadParameter(
            f"expected {path} of the same sources to resume; they have changed"
        )
    for case in before["cases"]:
        case["rows"] = [row for row in case["rows"] if row["status"] != "skipped"]
    before["layouts"] = [entry for entry in before["layouts"] if entry["status"] != "skipped"]
    before["finished"] = False
    return before


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
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
        Dtype | None, typer.Option(help="Of q, k and v.", show_default="bf16; fp32 on a CPU")
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
            "are those of the first.",
            show_default="all that serve here but the reference, this device's default first",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON record; the plot goes beside it as .png.")
    ] = Path("bench-output/attn.json"),
    device: Annotated[
        Device, typer.Option(help="Where to run; auto is CUDA if any.")
    ] = Device.auto,
    size: Annotated[
        SizeName | None,
        typer.Option(
            help="The shapes in full, small (their structure, for a CPU), or tiny (a rehearsal).",
            show_default="full; small on a CPU",
        ),
    ] = None,
    storage: Annotated[
        Storage,
        typer.Option(
            help="How q, k and v lie in memory: token after token [B, S, H, D], as projections "
            "leave them, or head after head [B, H, S, D]."
        ),
    ] = Storage.tokens,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few repeats: a look, no figures.")
    ] = False,
    graph: Annotated[
        bool,
        typer.Option("--graph", help="Also time replays of a CUDA graph (no host in the way)."),
    ] = False,
    layouts: Annotated[
        bool, typer.Option(help="Also time making the layout, against create_block_mask.")
    ] = True,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which no new measurement starts; the rest is recorded as skipped.",
            show_default="none",
            min=0,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the record at --out: rows that are there stay."),
    ] = False,
) -> None:
    """Check masked_attention and its rivals against float64, then time them.

    Every shape (A to G), heads and direction: p20/p50/p80 in ms, useful TFLOP/s (nobody gets credit
    for computing what is masked), how many times faster ours is, the error. On CUDA device time
    with a cold L2. Rivals named ...-parts are kernels alone: inputs cut beforehand, outputs left
    apart.

    Exit status: 0; 1 if a backend of ours was wrong or failed; 2 wrong usage; 3 if a kernel broke
    the CUDA context (run the same again with --resume: the culprit's row is kept, as failed).
    """
    torch_device = pick_device(device)
    on_cuda = torch_device.type == "cuda"
    chosen_size = (size or (SizeName.full if on_cuda else SizeName.small)).value
    chosen = SIZES[chosen_size]
    dtype_name = (dtype or (Dtype.bf16 if on_cuda else Dtype.fp32)).value
    shapes = [chosen.shapes[name] for name in pick(shape or [], list(chosen.shapes), "shapes")]
    all_heads = [parse_heads(text) for text in heads or []] or list(chosen.heads)
    asked = [entry.value for entry in direction or []]
    directions = [name for name in records.DIRECTIONS if not asked or name in asked]
    probe = torch.empty(
        1, 1, 1, head_dim or chosen.head_dim, dtype=DTYPES[dtype_name], device=torch_device
    )
    present, unavailable = pick_peers(probe, backend or [], rival or [])
    settings = {
        "size": chosen_size,
        "shapes": [entry.name for entry in shapes],
        "heads": [list(pair) for pair in all_heads],
        "head_dim": head_dim or chosen.head_dim,
        "dtype": dtype_name,
        "directions": directions,
        "storage": storage.value,
        "quick": quick,
        "peers": {peer.name: peer.legend for peer in present},
    }
    record = {
        "schema": records.SCHEMA,
        "bench": "attn",
        "finished": False,
        "environment": timing.environment(torch_device),
        "settings": settings,
        "ceilings": {},
        "unavailable": unavailable,
        "cases": [],
        "layouts": [],
    }
    if resume:
        record = resumed(out, record)
    records.write(record, out)
    runner = Runner(
        record=record,
        out=out,
        device=torch_device,
        dtype=DTYPES[dtype_name],
        head_dim=settings["head_dim"],
        storage=storage.value,
        present=present,
        shapes=shapes,
        heads=all_heads,
        directions=directions,
        effort=(timing.QUICK if quick else timing.FULL)[torch_device.type],
        graph=graph,
        layouts=layouts,
        budget=budget,
    )
    try:
        runner.run()
    except DeviceLostError as lost:
        print(lost, file=sys.stderr)
        raise typer.Exit(EXIT_DEVICE_LOST) from lost

    # A pipe has no width of its own: take one that keeps a row on a line.
    tables.print_attention(record, Console(width=None if sys.stdout.isatty() else 200))
    picture = out.with_suffix(".png")
    plots.plot_attention(record, picture)
    print(f"wrote {out} and {picture}")
    wrong = records.our_failures(record)
    for line in wrong:
        print(f"RED {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(EXIT_RED)


if __name__ == "__main__":
    app()
