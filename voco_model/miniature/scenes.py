"""Pictures of handwritten digits, and questions about them.

A picture is 48 x 48 pixels in four quarters. Two to four of these hold a digit in one of four colours:
one of scikit-learn's 1,797 (8 x 8 pixels, the UCI Machine Learning Repository's "Optical Recognition of
Handwritten Digits"), enlarged to 16 x 16, at a random place in its quarter. 1,437 digits are for
training and 360 others for evaluation: scans that no model has seen, though by the same 13 writers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIZE = 48
QUARTER = SIZE // 2
DIGIT = 16  # pixels per side of a digit
# Pixels between the places of a digit in its quarter, equal to the vision tower's patch.
STEP = 4
NOISE = 10.0  # standard deviation of the noise, for pixels from 0 to 255
TRAINING_DIGITS = 1437

COLOURS = {
    "red": (255, 64, 64),
    "green": (64, 230, 64),
    "blue": (90, 120, 255),
    "yellow": (255, 230, 64),
}
PLACES = ("northwest", "northeast", "southwest", "southeast")


@dataclass(frozen=True)
class Digits:
    """Handwriting: ``images`` float32 ``[N, 16, 16]`` from 0 to 1, ``labels`` int ``[N]``."""

    images: np.ndarray
    labels: np.ndarray


@cache
def digits(split: str) -> Digits:
    """scikit-learn's digits, enlarged.

    Args:
        split: ``"train"`` (1,437 of them) or ``"test"`` (the other 360), always the same.

    Raises:
        ModuleNotFoundError: the extra ``miniature`` isn't installed.
        ValueError: another split.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected the extra 'miniature' for handwritten digits, got no {error.name}; "
            "pip install 'voco-kernels[miniature]'"
        ) from error
    if split not in ("train", "test"):
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")
    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    chosen = order[:TRAINING_DIGITS] if split == "train" else order[TRAINING_DIGITS:]
    small = (found.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((DIGIT, DIGIT), Image.BILINEAR) for image in small]
    return Digits(np.stack(large).astype(np.float32) / 255, found.target[chosen])


@dataclass(frozen=True)
class Drawn:
    """A digit in its quarter: index in the split, label, name of the colour, offset of the corner."""

    index: int
    label: int
    colour: str
    down: int
    right: int


@dataclass(frozen=True)
class Scene:
    """The content of a picture: a digit or None for each of ``PLACES``."""

    quarters: tuple[Drawn | None, Drawn | None, Drawn | None, Drawn | None]

    def drawn(self) -> list[Drawn]:
        return [digit for digit in self.quarters if digit is not None]


def draw_scene(rng: np.random.Generator, split: str, least: int = 2) -> Scene:
    """A random scene with ``least`` to four digits of the split."""
    labels = digits(split).labels
    colours = list(COLOURS)
    count = rng.integers(least, 5)
    filled = set(rng.permutation(4)[:count].tolist())
    room = (QUARTER - DIGIT) // STEP + 1
    quarters = []
    for place in range(4):
        if place not in filled:
            quarters.append(None)
            continue
        index = int(rng.integers(len(labels)))
        down, right = (STEP * rng.integers(0, room, 2)).tolist()
        colour = colours[rng.integers(len(colours))]
        quarters.append(Drawn(index, int(labels[index]), colour, down, right))
    return Scene(tuple(quarters))


def paint(scene: Scene, split: str, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 ``[48, 48, 3]``; the generator draws its noise."""
    canvas = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    images = digits(split).images
    for place, digit in enumerate(scene.quarters):
        if digit is not None:
            top = QUARTER * (place // 2) + digit.down
            left = QUARTER * (place % 2) + digit.right
            ink = images[digit.index][:, :, None] * np.array(COLOURS[digit.colour], np.float32)
            canvas[top : top + DIGIT, left : left + DIGIT] = ink
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * NOISE
    return canvas.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Question:
    """A question with its answer, both as text, and its kind, a key of ``KINDS``."""

    kind: str
    text: str
    answer: str


def _digit(scene: Scene) -> list[tuple[str, str]]:
    return [
        (f"Which digit is in the {place}?", "none" if digit is None else str(digit.label))
        for place, digit in zip(PLACES, scene.quarters, strict=True)
    ]


def _colour(scene: Scene) -> list[tuple[str, str]]:
    return [
        (f"Which colour is in the {place}?", "none" if digit is None else digit.colour)
        for place, digit in zip(PLACES, scene.quarters, strict=True)
    ]


def _count(scene: Scene) -> list[tuple[str, str]]:
    return [("How many digits?", str(len(scene.drawn())))]


def _largest(scene: Scene) -> list[tuple[str, str]]:
    return [("Which digit is largest?", str(max(digit.label for digit in scene.drawn())))]


def _smallest(scene: Scene) -> list[tuple[str, str]]:
    return [("Which digit is smallest?", str(min(digit.label for digit in scene.drawn())))]


def _colours(scene: Scene) -> list[tuple[str, str]]:
    return [("How many colours?", str(len({digit.colour for digit in scene.drawn()})))]


KINDS: dict[str, Callable[[Scene], list[tuple[str, str]]]] = {
    "digit": _digit,
    "colour": _colour,
    "count": _count,
    "largest": _largest,
    "smallest": _smallest,
    "colours": _colours,
}
"""Kinds of questions; each function returns all of its kind about a scene, with answers."""


def questions_of(scene: Scene, kind: str) -> list[Question]:
    """All questions of this kind: one for each quarter, or one."""
    return [Question(kind, *each) for each in KINDS[kind](scene)]


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A random question of this kind."""
    known = questions_of(scene, kind)
    return known[rng.integers(len(known))]


def ask_many(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """``count`` different questions, or all 12, in random order."""
    known = [question for kind in KINDS for question in questions_of(scene, kind)]
    return [known[i] for i in rng.permutation(len(known))[:count].tolist()]


def describe(scene: Scene, rng: np.random.Generator) -> Question:
    """A caption with the quarters in random order: "southwest red 7, northeast none, ..."."""
    parts = []
    for place in rng.permutation(4).tolist():
        digit = scene.quarters[place]
        shown = "none" if digit is None else f"{digit.colour} {digit.label}"
        parts.append(f"{PLACES[place]} {shown}")
    return Question("caption", "Describe the picture.", ", ".join(parts))
