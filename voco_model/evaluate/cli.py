"""``python -m voco_model eval``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str, typer.Option(help="Folder or hub name of a checkpoint (Hugging Face layout).")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval, separated by commas.")],
    output: Annotated[Path, typer.Option(help="Folder for the results and the table.")],
    method: Annotated[
        list[str],
        typer.Option(
            help="NAME or NAME:TOKENS of a method (voco_model.baselines.METHODS); repeatable."
        ),
    ] = ["full", "untrained", "voco"],  # noqa: B006
    num_tokens: Annotated[
        int | None, typer.Option(help="Tokens per image, for methods named without them.")
    ] = None,
    upper: Annotated[
        str | None,
        typer.Option(help="Checkpoint instead of --model, for methods not trained to compress."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD=PATH: checkpoint instead of --model, for one method; repeatable."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD.NAME=VALUE: a method's option, such as fastv.layer=3; repeatable."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; by default all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 8,
    several_images: Annotated[
        str, typer.Option(help="For questions with several images: refuse, or take the middle one.")
    ] = "refuse",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights; auto keeps the checkpoint's.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU, if there is one.")
    ] = None,
) -> None:
    """Measure methods on the paper's benchmarks through lmms-eval; see docs/evaluation.md."""
    # lmms-eval's logger reads this on import; its default prints a lot before anything that matters.
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    try:
        checkpoints = dict(_pair(text, "METHOD=PATH") for text in checkpoint or ())
        options = _options(option or ())
        from voco_model.evaluate.run import evaluate as run

        table = run(
            model,
            [name.strip() for name in tasks.split(",") if name.strip()],
            output=output,
            methods=method,
            num_tokens=num_tokens,
            upper=upper,
            checkpoints=checkpoints,
            options=options,
            limit=limit,
            batch_size=batch_size,
            several_images=several_images,
            dtype=dtype,
            device=device,
        )
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("VOCO_TRACEBACK"):
            raise
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    if table is not None:
        print(table)


def _pair(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"expected {form}, got {text!r}")
    return name, value


def _options(given: list[str]) -> dict[str, dict]:
    """``["fastv.layer=3"]`` -> ``{"fastv": {"layer": 3}}``; values are JSON, or else text."""
    options: dict[str, dict] = {}
    for text in given:
        name, value = _pair(text, "METHOD.NAME=VALUE")
        method, dot, own = name.partition(".")
        if not (method and dot and own):
            raise ValueError(f"expected METHOD.NAME=VALUE, got {text!r}")
        try:
            value = json.loads(value)
        except ValueError:
            pass  # text, not JSON
        options.setdefault(method, {})[own] = value
    return options
