"""Recipes: which models are trained, for how long, and what is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from voco_model.miniature.model import Shape


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of all trainings of a run.

    Attributes:
        shape: sizes of the model.
        seeds: number of repetitions, of everything after the vision tower.
        counts: numbers of tokens per picture.
        tower_steps: steps for the vision tower, which all models share, as LLaVAs share CLIP.
        start_steps: steps for the LLaVA that all methods start from.
        tune_steps: steps for each method, including the upper bound.
        long: factor by which the Q-Former's second schedule is longer; 0 for none.
        tower_batch, batch: pictures per step.
        questions: questions per conversation.
        tower_rate, start_rate, tune_rate: peak learning rates.
        drawn: train one more VoCo model for all counts.
        distinct: numbers of VoCo tokens for further models with an embedding row for each.
        fastv_layer: layer before which FastV drops vision tokens.
        pictures: pictures in the exam, each with a question of every kind.
        exam_seed: seed of the exam.
    """

    shape: Shape = field(default_factory=Shape)
    seeds: int = 3
    counts: tuple[int, ...] = (1, 2, 4, 8)
    tower_steps: int = 1500
    start_steps: int = 650
    tune_steps: int = 600
    long: int = 3
    tower_batch: int = 32
    batch: int = 16
    questions: int = 8
    tower_rate: float = 4e-3
    start_rate: float = 8e-3
    tune_rate: float = 5e-3
    drawn: bool = True
    distinct: tuple[int, ...] = (4,)
    fastv_layer: int = 2
    pictures: int = 120
    exam_seed: int = 2027

    def to_dict(self) -> dict:
        return json.loads(json.dumps(asdict(self)))


FULL = Recipe()
QUICK = Recipe(
    seeds=1,
    counts=(1,),
    tower_steps=600,
    start_steps=350,
    tune_steps=300,
    long=0,
    drawn=False,
    distinct=(),
    pictures=50,
)


@dataclass(frozen=True)
class Job:
    """A model to train.

    Attributes:
        row: ``"tower"``, the vision tower; ``"start"``, the LLaVA that the others start from; or a row
            of the tables. ``"full"`` also serves the rows without training of their own (FastV, random
            tokens, the lower bound).
        count: tokens per picture; 0 for all of them, or for a drawn number.
        seed: None for the tower.
        steps: training steps.
        work: cost, in steps that read whole pictures.
    """

    row: str
    count: int
    seed: int | None
    steps: int
    work: float

    @property
    def name(self) -> str:
        if self.seed is None:
            return self.row
        row = self.row.replace(" ", "-")
        return f"seed-{self.seed}/{row}" + (f"-{self.count}" if self.count else "")

    @property
    def needs(self) -> str | None:
        """The name of the job whose model this one starts from."""
        if self.row == "tower":
            return None
        return "tower" if self.row == "start" else f"seed-{self.seed}/start"


def jobs(recipe: Recipe) -> Iterator[Job]:
    """All trainings, each after the one it needs."""

    yield Job("tower", 0, None, recipe.tower_steps, recipe.tower_steps / 4)
    for seed in range(recipe.seeds):
        yield Job("start", 0, seed, recipe.start_steps, recipe.start_steps)
        tune = recipe.tune_steps
        if recipe.long:  # first, so that the longest doesn't run alone at the end
            steps = recipe.long * tune
            yield Job("qformer long", recipe.counts[0], seed, steps, steps / 2)
        yield Job("full", 0, seed, tune, tune)
        for count in recipe.counts:
            yield Job("voco", count, seed, tune, tune)
        if recipe.drawn:
            yield Job("voco drawn", 0, seed, tune, tune)
        for count in recipe.distinct:
            yield Job("voco distinct", count, seed, tune, tune)
        # Half the work: the language model reads a few tokens instead of a whole picture.
        for row in ("pooling", "qformer"):
            for count in recipe.counts:
                yield Job(row, count, seed, tune, tune / 2)
