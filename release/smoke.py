"""Try an installed package, away from the checkout: the mask, the extension, and a picture asked about.

    python release/smoke.py [--extension]

With ``--extension`` the wheel must hold the CUDA extension; without it there must be none. The picture
is like those that the packaged miniature was trained on: coloured digits on black, one in a quarter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import voco_kernels as vk
import voco_model
from voco_kernels import extension

QUESTIONS = {
    "Which colour is in the northwest?": "red",
    "Which colour is in the northeast?": "none",
    "Which colour is in the southeast?": "green",
    "How many digits?": "2",
}


def check_attention() -> None:
    """``masked_attention`` equals SDPA under the dense mask."""
    layout = vk.MaskLayout.from_lengths(vision=9, voco=2, text=5)
    q, k, v = torch.randn(3, 1, 4, layout.length, 64)
    mask = layout.materialize()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(vk.masked_attention(q, k, v, layout), expected)


def check_extension(expected: bool) -> None:
    """The CUDA extension imports, without a driver, if and only if the wheel holds it."""
    module, reason = extension.load()
    if expected and module is None:
        raise SystemExit(f"the CUDA extension was not imported: {reason}")
    if not expected and module is not None:
        raise SystemExit(f"expected a wheel without the CUDA extension, got {module.__file__}")


def picture() -> Image.Image:
    """A red stroke in the northwest and a green one in the southeast, RGB, 48 x 48 pixels."""
    canvas = Image.new("RGB", (48, 48))
    draw = ImageDraw.Draw(canvas)
    for left, top, colour in ((12, 5, (255, 64, 64)), (36, 29, (64, 230, 64))):
        draw.line([(left, top), (left, top + 13)], fill=colour, width=4)
    return canvas


def check_miniature() -> None:
    """The packaged LLaVA answers from four VoCo tokens."""
    checkpoint = Path(voco_model.__file__).parent / "miniature" / "checkpoints" / "voco"
    model, processor = voco_model.load(checkpoint)
    entries = voco_model.compress(model, picture(), processor=processor)
    tokens = voco_model.generate(
        model, entries, list(QUESTIONS), processor=processor, max_new_tokens=4, do_sample=False
    )
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    for (question, expected), answer in zip(QUESTIONS.items(), answers, strict=True):
        print(f"{question} {answer.strip()}")
        if answer.strip() != expected:
            raise SystemExit(f"{question} expected {expected!r}, got {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--extension", action="store_true", help="the wheel holds the CUDA extension"
    )
    arguments = parser.parse_args()
    print(f"voco-kernels {vk.__version__} in {Path(vk.__file__).parent}, torch {torch.__version__}")
    check_attention()
    check_extension(arguments.extension)
    check_miniature()


if __name__ == "__main__":
    main()
