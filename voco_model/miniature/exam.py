"""The exam: questions about pictures of held-out digits, and a method's share of correct answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from voco_model.baselines.base import Method
from voco_model.miniature.scenes import KINDS, Question, ask, draw_scene, paint, questions_of

PRICED = "Which digit is in the northwest?"
"""The question whose cost is reported, in Listing 1's prompt and with BOS."""


@dataclass(frozen=True)
class Exam:
    """Pictures, and for each of them a question of every kind.

    Attributes:
        without_places: by kind, the share of correct answers for a guesser that knows what is in each
            picture but not where, and gives the most frequent of the quarters' four answers.
    """

    pictures: list[Image.Image]
    questions: list[list[Question]]
    without_places: dict[str, float]


def make_exam(pictures: int, seed: int) -> Exam:
    """Make an exam with digits that no training has seen."""
    rng = np.random.default_rng(seed)
    shown, asked, guessed = [], [], dict.fromkeys(KINDS, 0.0)
    for _ in range(pictures):
        scene = draw_scene(rng, "test")
        shown.append(Image.fromarray(paint(scene, "test", rng)))
        asked.append([ask(scene, kind, rng) for kind in KINDS])
        for kind in KINDS:
            answers = Counter(question.answer for question in questions_of(scene, kind))
            guessed[kind] += max(answers.values()) / sum(answers.values())
    return Exam(shown, asked, {kind: right / pictures for kind, right in guessed.items()})


def score(method: Method, exam: Exam, pictures_at_once: int = 16) -> dict[str, float]:
    """Share of correct answers by kind of question. Each question is asked separately, and an answer
    counts if it matches exactly."""
    right = dict.fromkeys(KINDS, 0)
    for start in range(0, len(exam.pictures), pictures_at_once):
        stop = start + pictures_at_once
        pairs = [
            (picture, question)
            for picture, questions in zip(
                exam.pictures[start:stop], exam.questions[start:stop], strict=True
            )
            for question in questions
        ]
        answers = method.answer(
            [picture for picture, _ in pairs],
            [question.text for _, question in pairs],
            max_new_tokens=2,
            do_sample=False,
        )
        for (_, question), answer in zip(pairs, answers, strict=True):
            right[question.kind] += answer == question.answer
    return {kind: count / len(exam.pictures) for kind, count in right.items()}
