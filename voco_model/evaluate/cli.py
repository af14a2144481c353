"""``voco eval``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from voco_model.cli_common import Device, check_checkpoint, check_device, reported_errors


def evaluate(
    model: Annotated[
        str, typer.Option(help="Folder or Hub name of a checkpoint in the Hugging Face layout.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Tasks of lmms-eval, separated by commas.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the results and the table.")],
    method: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[:TOKENS]",
            help="A method to measure, a name of voco_model.baselines.METHODS; may be repeated.",
        ),
    ] = ["full", "untrained", "voco"],  # noqa: B006
    num_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens per image, for methods that are named without a number; full takes none. By "
            "default what the checkpoint says."
        ),
    ] = None,
    upper: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint for methods that are not tuned to compress, instead of --model."
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=PATH",
            help="The checkpoint for one method, instead of --model; may be repeated.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD.NAME=VALUE",
            help="An option of one method, such as fastv.layer=3; may be repeated.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; by default all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 8,
    several_images: Annotated[
        str,
        typer.Option(
            metavar="refuse|middle", help="What to do with a question about several images."
        ),
    ] = "refuse",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the weights, such as bfloat16; auto leaves them as they are.",
        ),
    ] = "auto",
    device: Device = None,
) -> None:
    """Measure methods on the paper's benchmarks through lmms-eval; see docs/evaluation.md."""
    # lmms-eval's logger reads this on import; its default prints a lot before anything that matters.
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    with reported_errors(RuntimeError, options=("num_tokens", "batch_size", "several_images")):
        checkpoints = dict(_pair(text, "METHOD=PATH") for text in checkpoint or ())
        options = _options(option or ())
        for path in (model, *filter(None, [upper]), *checkpoints.values()):
            check_checkpoint(path)
        check_device(device)
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
