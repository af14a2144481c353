"""``voco explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voco_model.cli_common import (
    Device,
    check_checkpoint,
    check_device,
    check_file,
    reported_errors,
)
from voco_model.explain.output import check_path


def explain(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="The picture.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="Folder or Hub name of a model trained with VoCo tokens.")
    ],
    question: Annotated[
        str, typer.Option(metavar="TEXT", help="A question about the picture.")
    ] = "Describe this image in one sentence.",
    output: Annotated[
        Path,
        typer.Option(help="The file to write: a .png, or an .html that shows every layer."),
    ] = Path("explain.png"),
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: Device = None,
) -> None:
    """Draw what each VoCo token looked at in an image, and what the text took from it."""
    with reported_errors(RuntimeError):
        check_path(output)
        check_file(image, "a picture")
        check_checkpoint(model)
        check_device(device)
        from voco_model import load
        from voco_model.devices import usable_device
        from voco_model.explain import attention, draw
        from voco_model.pictures import size_of
        from voco_model.vlm.load import read_config

        size_of(image)  # before a model is loaded for what is no picture
        # load would give a plain LLaVA a VoCo token, which has learnt nothing.
        config = read_config(model)
        if getattr(config, "num_voco", None) is None:
            raise ValueError(
                f"expected a model that was trained with VoCo tokens, got {model}, whose config has no "
                "num_voco; voco train makes one"
            )
        baseline = getattr(config, "voco_baseline", None)
        if baseline is not None:
            raise ValueError(
                f"expected a model that was trained with VoCo's mask, got {model}, made for "
                f"{baseline['name']!r}; name one that voco train has made"
            )
        loaded, processor = load(model, device=usable_device(device))
        found = attention(loaded, image, question, processor=processor, max_new_tokens=new_tokens)
        draw(found, output)
    print(f"answer: {found.answer}")
    print(f"written: {output}")
