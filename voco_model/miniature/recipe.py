"""What is trained, for how long, and what is then compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from voco_model.miniature.model import Shape


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of all trainings of one run.

    Attributes:
        shape: of the model.
        seeds: how often everything behind the vision tower is done, from other random numbers.
        counts: of tokens that stand for a picture.
        tower_steps: of the vision tower, which all share as LLaVAs share CLIP.
        start_steps: to the LLaVA that all methods start from.
        tune_steps: of each method, the upper bound too.
        long: how many times as long the Q-Former's own schedule is; 0 for none.
        tower_batch, batch: pictures a step.
        questions: about each, in a conversation.
        tower_rate, start_rate, tune_rate: peak learning rates.
        drawn: also one VoCo model for all counts. ``distinct``: counts of VoCo tokens for which there is
            also a model with an embedding row for each.
        fastv_layer: in front of which FastV drops vision tokens.
        pictures: in the exam, each with a question of every kind. ``exam_seed``: of these.
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
    """Something to train.

    Attributes:
        row: ``"tower"``, the vision tower; ``"start"``, the LLaVA that all else starts from; or the row
            of the tables that it is for, where ``"full"`` stands for all that need no training of their
            own too (FastV, random tokens, the lower bound).
        count: of tokens a picture; 0 where that is all of them, or drawn.
        seed: None for the tower.
        steps: of training.
        work: in steps that read all of a picture.
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
        """The name of the job whose model it goes on from."""
        if self.row == "tower":
            return None
        return "tower" if self.row == "start" else f"seed-{self.seed}/start"


def jobs(recipe: Recipe) -> Iterator[Job]:
    """All trainings, each behind what it needs."""

    yield Job("tower", 0, None, recipe.tower_steps, recipe.tower_steps / 4)
    for seed in range(recipe.seeds):
        yield Job("start", 0, seed, recipe.start_steps, recipe.start_steps)
        tune = recipe.tune_steps
        if recipe.long:  # first: the longest is not to run alone in the end
            steps = recipe.long * tune
            yield Job("qformer long", recipe.counts[0], seed, steps, steps / 2)
        yield Job("full", 0, seed, tune, tune)
        for count in recipe.counts:
            yield Job("voco", count, seed, tune, tune)
        if recipe.drawn:
            yield Job("voco drawn", 0, seed, tune, tune)
        for count in recipe.distinct:
            yield Job("voco distinct", count, seed, tune, tune)
        # Their language model reads a few tokens in place of a whole picture.
        for row in ("pooling", "qformer"):
            for count in recipe.counts:
                yield Job(row, count, seed, tune, tune / 2)
