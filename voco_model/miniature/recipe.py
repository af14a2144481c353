"""What is trained, for how long, and what is then compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from voco_model.miniature.model import Shape


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of all trainings of one run.

    Attributes:
        shape: of the model.
        seeds: how often everything is done, from other random numbers.
        counts: of tokens that stand for a picture.
        tower_steps, caption_steps, start_steps: from nothing to the LLaVA that all methods start from.
        tune_steps: of each method, the upper bound too.
        long_steps: of the Q-Former's own, longer training; 0 for none.
        batch: pictures a step; ``questions`` about each.
        tower_rate, rate: peak learning rates, of the tower and of everything else.
        drawn: also one VoCo model for all counts. ``distinct``: counts of VoCo models with a row each.
        fastv_layer: in front of which FastV drops vision tokens.
        pictures: in the exam, each with a question of every kind.
    """

    shape: Shape = field(default_factory=Shape)
    seeds: int = 3
    counts: tuple[int, ...] = (1, 2, 4, 8)
    tower_steps: int = 1500
    caption_steps: int = 400
    start_steps: int = 600
    tune_steps: int = 300
    long_steps: int = 900
    batch: int = 16
    questions: int = 12
    tower_rate: float = 4e-3
    rate: float = 3e-3
    drawn: bool = True
    distinct: tuple[int, ...] = (4, 8)
    fastv_layer: int = 2
    pictures: int = 150

    def to_dict(self) -> dict:
        return asdict(self) | {"counts": list(self.counts), "distinct": list(self.distinct)}


FULL = Recipe()
QUICK = Recipe(
    seeds=1,
    counts=(1,),
    tower_steps=700,
    caption_steps=250,
    start_steps=300,
    tune_steps=150,
    long_steps=0,
    drawn=False,
    distinct=(),
    pictures=60,
)


@dataclass(frozen=True)
class Job:
    """A model to train from where ``start`` has brought it, or ``start`` itself.

    Attributes:
        row: ``"start"``, or the row of the tables that it is for; ``"full"`` stands for all that need no
            training of their own too (FastV, random tokens, the lower bound).
        count: of tokens a picture; 0 where that is all of them, or drawn.
        work: in steps of one that reads a whole picture.
    """

    row: str
    count: int
    seed: int
    steps: int
    work: float

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/{self.row}" + (f"-{self.count}" if self.count else "")


def jobs(recipe: Recipe) -> Iterator[Job]:
    """All trainings, of each seed the start first."""
    for seed in range(recipe.seeds):
        steps = recipe.tower_steps + recipe.caption_steps + recipe.start_steps
        work = recipe.tower_steps / 3 + recipe.caption_steps / 2 + recipe.start_steps
        yield Job("start", 0, seed, steps, work)
        tune = recipe.tune_steps
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
        if recipe.long_steps:
            yield Job("qformer long", recipe.counts[0], seed, recipe.long_steps, tune)
