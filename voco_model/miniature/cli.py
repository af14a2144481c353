"""``voco miniature``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from voco_model.cli_common import Device, check_device, reported_errors


def miniature(
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoints, the tables and the plot.")
    ] = Path("miniature"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, one VoCo token and shorter trainings.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Trainings of each method, instead of the recipe's.", min=1)
    ] = None,
    distinct: Annotated[
        list[int] | None,
        typer.Option(
            help="Also train with this many VoCo tokens that have an embedding row each, instead of the "
            "recipe's; may be repeated.",
            min=2,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes; by default one per CPU, or one on a GPU.", min=1),
    ] = None,
    device: Device = None,
    write_data: Annotated[
        Path | None,
        typer.Option(
            help="Only write 1,000 training conversations with their pictures to this folder, for "
            "voco train."
        ),
    ] = None,
) -> None:
    """Train small LLaVAs on pictures of digits, compress them in every way, and compare."""
    with reported_errors(RuntimeError):
        check_device(device)
        if write_data is not None:
            from voco_model.miniature.dataset import write_data as write

            print(f"written: {write(write_data)}")
            return
        from rich.console import Console
        from rich.markdown import Markdown

        from voco_model.miniature.recipe import FULL, QUICK
        from voco_model.miniature.report import tables
        from voco_model.miniature.run import run

        recipe = QUICK if quick else FULL
        if seeds is not None:
            recipe = replace(recipe, seeds=seeds)
        if distinct:
            recipe = replace(recipe, distinct=tuple(sorted(set(distinct))))
        console = Console()
        results = run(recipe, output, workers=workers, device=device, console=console)
    for text in tables(results).values():
        console.print(Markdown(text))
    print(f"written: {output}/results.json, tables.md, retention.png")
