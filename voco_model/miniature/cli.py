"""``python -m voco_model miniature``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def miniature(
    output: Annotated[Path, typer.Option(help="folder of checkpoints, tables and the plot")] = Path(
        "miniature"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="one seed, one token, shorter trainings")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="in place of the recipe's", min=1)] = None,
    distinct: Annotated[
        list[int] | None,
        typer.Option(
            help="in place of the recipe's: counts of VoCo tokens with a row each; may be given several "
            "times",
            min=2,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="processes; by default one a CPU, or one on a GPU", min=1)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one")
    ] = None,
) -> None:
    """Train small LLaVAs on pictures of digits, compress them in every way, and compare."""
    from rich.console import Console
    from rich.markdown import Markdown

    try:
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
