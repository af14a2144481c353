"""``python -m voco_model explain``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def explain(
    image: Annotated[Path, typer.Argument(help="The image.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or hub name of a VoCo model.")],
    question: Annotated[
        str, typer.Option(help="The question about the image.")
    ] = "Describe this image in one sentence.",
    output: Annotated[Path, typer.Option(help="A .png, or an .html with every layer.")] = Path(
        "explain.png"
    ),
    new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU, if there is one.")
    ] = None,
) -> None:
    """Draw what each VoCo token looked at in an image, and what the text took from it."""

    from voco_model import load
    from voco_model.devices import usable_device
    from voco_model.explain import attention, draw
    from voco_model.explain.drawing import check_path
    from voco_model.pictures import size_of
    from voco_model.vlm.load import read_config

    try:
        # Everything that can be wrong is checked before the model is loaded.
        check_path(output)
        size_of(image)
        usable = usable_device(device)
        # load would add an untrained VoCo token to a plain LLaVA.
        config = read_config(model)
        if getattr(config, "num_voco", None) is None:
            raise ValueError(
                f"expected a model that was trained with VoCo tokens, got {model}, whose config has no "
                "num_voco; python -m voco_model train makes one"
            )
        baseline = getattr(config, "voco_baseline", None)
        if baseline is not None:
            raise ValueError(
                f"expected a model that was trained with VoCo's mask, got {model}, trained for "
                f"{baseline['name']!r}; python -m voco_model train makes one"
            )
        loaded, processor = load(model, device=usable)
        found = attention(loaded, image, question, processor=processor, max_new_tokens=new_tokens)
        draw(found, output)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("VOCO_TRACEBACK"):
            raise
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"answer: {found.answer}")
    print(f"written: {output}")
