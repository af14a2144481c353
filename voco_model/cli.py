"""The command ``voco``, also ``python -m voco_model``.

Each command imports what it needs when it runs, so help, ``--version`` and argument errors are fast.
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import voco_model
from voco_model import cli_store
from voco_model.cli_common import (
    Command,
    Group,
    check_checkpoint,
    check_file,
    reported_errors,
)
from voco_model.evaluate.cli import evaluate
from voco_model.explain.cli import explain
from voco_model.miniature.cli import miniature

app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
convert_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Convert checkpoints from the layout of VoCo-LLaMA's authors to Hugging Face's, and back.",
)

# The names of vlm.prompt.STYLES, which are too heavy to import for help.
PromptStyle = Enum(
    "PromptStyle", {name: name for name in ("vicuna", "authors", "mistral", "chatml")}, type=str
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    found = [f"voco-kernels {voco_model.__version__}"]
    for package in ("torch", "transformers", "triton"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    print(", ".join([*found, f"Python {sys.version.split()[0]}"]))
    raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the versions of this package and of what it runs on, and exit.",
        ),
    ] = False,
) -> None:
    """Vision-token compression with VoCo-LLaMA."""


@app.command(cls=Command)
def demo(
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A question about the digits; may be repeated."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="How many pictures of digits to show.")] = 2,
    image: Annotated[
        Path | None,
        typer.Option(help="A photograph of yours; by default a portrait of Grace Hopper."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A question about the photograph; may be repeated."),
    ] = None,
    num_voco: Annotated[
        int, typer.Option(min=1, help="VoCo tokens that the photograph is compressed into.")
    ] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for the drawings.")] = Path("demo-output"),
) -> None:
    """Show digits before and after compression, and a photograph that is read once, on the CPU."""
    with reported_errors():
        if image is not None:
            check_file(image, "a photograph for --image")
        from voco_model.demo import demo as run_demo

        agreed = run_demo(
            ask=ask or (),
            pictures=pictures,
            image=image,
            questions=question,
            num_voco=num_voco,
            new_tokens=new_tokens,
            out=out,
        )
    raise typer.Exit(0 if agreed else 1)


@app.command(cls=Command)
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file; see docs/training.md.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the model, instead of the file's output."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of the LLaVA to train, instead of the file's model."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the data, and print what would be done."),
    ] = False,
) -> None:
    """Train a LLaVA to compress images; start it with torchrun for several GPUs."""
    with reported_errors():
        check_file(config, "a YAML file")
        _check_text(config)
        if model is not None:
            check_checkpoint(model)
        from voco_model.train import load_config
        from voco_model.train import train as run_training

        given = {"output": output, "model": model}
        read = load_config(config, **{k: str(v) for k, v in given.items() if v is not None})
        check_checkpoint(read.model)
        run_training(read, dry_run=dry_run)


def _check_text(config: Path) -> None:
    """Checks that a file is text in an encoding that YAML may have."""
    try:
        data = config.read_bytes()
        data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"expected a YAML file, got {config}, which is not text") from None


@convert_app.command(cls=Command)
def from_authors(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder of a checkpoint of the authors, or of a LLaVA-1.5."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to create.")],
    num_voco: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="VoCo tokens per image that the model was trained with. Required, except for an "
            "original LLaVA, which has none.",
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a CLIP model, instead of the checkpoint's."),
    ] = None,
    prompt: Annotated[
        PromptStyle | None,
        typer.Option(
            help="How prompts are written; by default authors, and nothing for an original LLaVA."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the weights, such as bfloat16; by default each keeps its own.",
        ),
    ] = None,
) -> None:
    """Write a checkpoint that from_pretrained and voco_model.load read."""
    with reported_errors(options=("num_voco", "vision_tower")):
        _check_folder(source)
        from voco_model import convert

        written = convert.from_authors(
            source,
            target,
            num_voco=num_voco,
            vision_tower=vision_tower,
            prompt=None if prompt is None else prompt.value,
            dtype=dtype,
        )
    print(f"written: {written}")


@convert_app.command(cls=Command)
def to_authors(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Folder of a checkpoint in the Hugging Face layout."),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to create.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Name of the CLIP model to write into the config, such as "
            "openai/clip-vit-large-patch14-336. Required if the model was not converted by from-authors."
        ),
    ] = None,
) -> None:
    """Write a checkpoint that the code of VoCo-LLaMA's authors reads."""
    with reported_errors(options=("vision_tower",)):
        _check_folder(source)
        from voco_model import convert

        written = convert.to_authors(source, target, vision_tower=vision_tower)
    print(f"written: {written}")


def _check_folder(source: Path) -> None:
    """Checks that a checkpoint to convert is a folder; convert takes no Hub names."""
    if not source.is_dir():
        why = "which is a file" if source.exists() else "which does not exist"
        raise NotADirectoryError(f"expected the folder of a checkpoint, got {source}, {why}")


app.command(cls=Command, name="eval")(evaluate)
app.command(cls=Command)(explain)
app.command(cls=Command)(miniature)
app.add_typer(cli_store.app, name="store")
app.add_typer(convert_app, name="convert")


def run() -> None:
    """The command, with the arguments of this process."""
    try:
        app()
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
