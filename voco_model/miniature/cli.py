"""``python -m voco_model miniature``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def miniature(
    output: Annotated[
        Path, typer.Option(help="Folder for checkpoints, tables and the plot.")
    ] = Path("miniature"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Use one seed, one VoCo token and fewer steps.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds, instead of the recipe's.", min=1)
    ] = None,
    distinct: Annotated[
        list[int] | None,
        typer.Option(
            help="Numbers of VoCo tokens with an embedding row each, instead of the recipe's; "
            "repeatable.",
            min=2,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one per CPU, or one on a GPU.", min=1)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU, if there is one.")
    ] = None,
    write_data: Annotated[
        Path | None,
        typer.Option(
            help="Only write 1,000 training conversations with their pictures to this folder, for "
            "python -m voco_model train."
        ),
    ] = None,
) -> None:
    """Train small LLaVAs on pictures of digits, compress their images by each method, and compare."""
    from rich.console import Console
    from rich.markdown import Markdown

    try:
        if write_data is not None:
            from voco_model.miniature.dataset import write_data as write

            print(f"written: {write(write_data)}")
            return
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
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("VOCO_TRACEBACK"):
            raise
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    for text in tables(results).values():
        console.print(Markdown(text))
    print(f"written: {output}/results.json, tables.md, retention.png")
