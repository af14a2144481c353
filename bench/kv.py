"""Time to load a compact entry into a model's key/value cache, against one copy of the same bytes.

    python bench/kv.py               # this machine's device; one entry of LLaVA-1.5-7B
    python bench/kv.py --help

Each load is compared with the entry, bit by bit, before it is timed; one that is wrong gets no time.
Loads and their floors take turns, each on cold caches. Tables go to stdout, progress to stderr, a JSON
record and a plot to ``--out``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import typer

from bench.harness import machine, options, run, turns
from bench.harness.options import Budget, DeviceOption, Quick
from bench.loading.loads import SOURCES
from bench.loading.report import FAMILY
from bench.loading.run import TOKENS, LoadingRunner, Servers
from bench.loading.scene import FREE_SLOTS, SIZES

MEASURED = (*machine.SOURCES, "voco_model/kv_store")
"""Folders whose code is timed."""

PACKAGES = ("numpy", "safetensors", "xxhash", "redis", "hiredis")
"""Those that files and hashes go through; their versions are recorded, too."""

app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in the entry; repeat for more.", show_default="1, 8, 64, 576"),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where to load from: memory, page cache, disk or redis; on CUDA, pinned memory and "
            "device instead of memory. Repeat for more.",
            show_default="all",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON record; the plot is written beside it as .png.")
    ] = Path("bench-output/kv.json"),
    device: DeviceOption = options.Device.auto,
    size: Annotated[
        str, typer.Option(help="The model: full (LLaVA-1.5-7B) or tiny (a dry run).")
    ] = "full",
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where to make (and remove) files: on the disk that is to be timed.",
            show_default="the system's folder for temporary files",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    quick: Quick = False,
    budget: Budget = None,
) -> None:
    """Check every way to load an entry into a StaticCache, then time them all in turns.

    From memory, from the page cache, from the disk (files are dropped from memory before each read) and
    from a Redis server on loopback, started for the run. p20/p50/p80 in ms on cold caches, and as a
    multiple of the floor: one copy of the same bytes, on a CPU with their checksum where the load
    computes it.

    Exit status: 0; 1 if a load of ours was wrong or failed; 2 for wrong usage; 3 if a kernel broke the
    CUDA context.
    """
    torch_device = options.pick_device(device)
    (size,) = options.pick([size], list(SIZES), "sizes")
    sources = options.pick(source, SOURCES[torch_device.type], "sources")
    if any(count < 1 for count in tokens or []):
        raise typer.BadParameter(f"expected at least one token, got {min(tokens)}")
    effort = (turns.QUICK if quick else turns.FULL)[torch_device.type]
    clock, model = turns.Clock(torch_device, effort), SIZES[size]
    settings = {
        "size": size,
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": "bf16",
        "tokens": sorted(tokens or TOKENS),
        "sources": sources,
        "free_slots": FREE_SLOTS,
        "evicted_bytes": clock.evicted_bytes,
        "quick": quick,
    }
    record = run.fresh(FAMILY, torch_device, settings, MEASURED, cases=[])
    versions = {package: machine.package_version(package) for package in PACKAGES}
    record["environment"]["versions"] |= versions
    with tempfile.TemporaryDirectory(prefix="voco-kv-", dir=folder) as temporary:
        servers = Servers(Path(temporary))
        runner = LoadingRunner(
            record=record,
            out=out,
            device=torch_device,
            budget=budget,
            model=model,
            sources=sources,
            tokens=list(tokens or TOKENS),
            sweep=torch_device.type == "cuda" and "pinned memory" in sources and not tokens,
            clock=clock,
            folder=Path(temporary),
            servers=servers,
        )
        try:
            run.finish(runner)
        finally:
            servers.stop()


if __name__ == "__main__":
    app()
