"""Shows the trained miniature's answers about held-out digits, before and after compression."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from voco_model import baselines
from voco_model.baselines.base import Method
from voco_model.miniature.exam import make_exam
from voco_model.miniature.scenes import SIZE, Question

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""``full`` and ``voco`` (four tokens with an embedding row each), trained for the same number of steps
from the same start; ``docs/quality.md`` has the command."""

_SEED = 7  # for the pictures shown
_ENLARGED = 8
_LONGEST = 20  # tokens per answer; a caption has up to 16


def load_pair() -> tuple[Method, Method]:
    """Two models: one with all vision tokens, one with a few VoCo tokens in two passes."""
    return baselines.load(CHECKPOINTS / "full", "full"), baselines.load(CHECKPOINTS / "voco")


def show(console: Console, out: Path, pictures: int = 2, asked: Sequence[str] = ()) -> None:
    """Print pictures, questions, and both models' answers side by side.

    Args:
        out: folder for the pictures: ``digits-1.png``, ``digits-2.png``, ...
        pictures: number of pictures of held-out digits.
        asked: the user's own questions about each picture; a terminal prompts for more.
    """
    exam = make_exam(pictures, seed=_SEED)
    before, after = load_pair()
    out.mkdir(parents=True, exist_ok=True)
    layers = before.model.config.text_config.num_hidden_layers
    console.print(
        f"Handwritten digits that no training has seen, and a LLaVA of {layers} layers and "
        f"{before.model.num_parameters() / 1e6:.1f} M\nweights, trained from scratch on others: with "
        f"all {before.num_tokens} vision tokens, and through {after.num_tokens} VoCo\ntokens. "
        f"The pictures are in {out / 'digits-*.png'}.",
        highlight=False,
        markup=False,
    )
    for number, (picture, questions) in enumerate(
        zip(exam.pictures, exam.questions, strict=True), start=1
    ):
        own = [Question("yours", text, "") for text in asked]
        table = answers(before, after, picture, [*questions, *own])
        table.title = f"digits-{number}.png"
        enlarged = (_ENLARGED * SIZE, _ENLARGED * SIZE)
        picture.resize(enlarged, Image.NEAREST).save(out / table.title)
        shown = [as_text(picture)] if console.color_system else []
        console.print(Columns([*shown, table]))
    if sys.stdin.isatty() and console.is_terminal:
        _converse(console, before, after, exam.pictures[-1])


def answers(
    before: Method, after: Method, picture: Image.Image, questions: Sequence[Question]
) -> Table:
    """Both models' answers; those that are known to be wrong in red."""
    texts = [question.text for question in questions]
    said = [
        method.answer([picture] * len(texts), texts, max_new_tokens=_LONGEST, do_sample=False)
        for method in (before, after)
    ]
    table = Table(
        "question", "in truth", f"{before.num_tokens} tokens", f"{after.num_tokens} VoCo tokens"
    )
    for question, one, other in zip(questions, *said, strict=True):
        wrong = [bool(question.answer) and text != question.answer for text in (one, other)]
        cells = [
            Text(text, style="red" if is_wrong else "green" if question.answer else "")
            for text, is_wrong in zip((one, other), wrong, strict=True)
        ]
        table.add_row(Text(question.text), question.answer or "?", *cells)
    return table


def as_text(picture: Image.Image) -> Text:
    """A picture as characters, each of them two pixels tall."""
    pixels = np.asarray(picture.resize((SIZE, SIZE)))
    drawn = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for one, other in zip(upper.tolist(), lower.tolist(), strict=True):
            drawn.append(
                "▀",
                style=f"rgb({one[0]},{one[1]},{one[2]}) on rgb({other[0]},{other[1]},{other[2]})",
            )
        drawn.append("\n")
    return drawn


def _converse(console: Console, before: Method, after: Method, picture: Image.Image) -> None:
    console.print(
        "Ask about the last picture, with words like those above; an empty line continues.",
        style="bold",
    )
    while text := _asked(console):
        try:
            console.print(answers(before, after, picture, [Question("yours", text, "")]))
        except ValueError as error:  # a question with <image> in it
            console.print(str(error), style="red", markup=False)


def _asked(console: Console) -> str:
    try:
        return console.input("> ").strip()
    except EOFError:  # Ctrl-D
        return ""
