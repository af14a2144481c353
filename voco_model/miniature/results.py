"""The results of a run: the rows of all jobs, and the machine that measured them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np

from voco_model.miniature.exam import make_exam
from voco_model.miniature.recipe import Recipe, jobs

LABELS = {
    "full": "All tokens (upper bound)",
    "voco": "VoCo",
    "voco drawn": "VoCo, one model for all counts",
    "voco distinct": "VoCo, a row for each token",
    "qformer": "Q-Former",
    "qformer long": "Q-Former, a longer schedule",
    "pooling": "Average pooling + linear",
    "fastv": "FastV (not trained)",
    "random": "Random tokens (not trained)",
    "untrained": "VoCo mask, untrained (lower bound)",
}
"""Labels of the tables' rows, in order."""


def collect(recipe: Recipe, output: Path) -> dict:
    """Collect the results of all jobs from the run's folder.

    Returns:
        ``recipe``; ``date`` of the last job; ``machine`` or machines that ran them;
        ``seconds`` of all jobs together; ``jobs``; ``rows``, each with its name, tokens, seed, accuracy
        by kind of question, cache bytes and FLOPs; ``without places``, which is ``Exam.without_places``.
    """
    done = [json.loads((output / job.name / "scores.json").read_text()) for job in jobs(recipe)]
    return {
        "recipe": recipe.to_dict(),
        "date": max(j["date"] for j in done),
        "machine": {
            key: " and ".join(sorted({j[key] for j in done}))
            for key in ("device", "torch", "transformers")
        },
        "seconds": round(sum(j["seconds"] for j in done)),
        "jobs": {j["job"]: {"steps": j["steps"], "seconds": j["seconds"]} for j in done},
        "rows": [row for j in done for row in j["rows"]],
        "without places": make_exam(recipe.pictures, recipe.exam_seed).without_places,
    }


class Rows:
    """The rows of a result, indexed by name, tokens and seed."""

    def __init__(self, results: dict) -> None:
        self._rows = {(r["row"], r["tokens"], r["seed"]): r for r in results["rows"]}
        self.seeds = sorted({r["seed"] for r in results["rows"]})
        self.kinds = list(results["rows"][0]["accuracy"])
        self.without_places = results["without places"]
        self._full = next(r["tokens"] for r in results["rows"] if r["row"] == "full")
        self._least = min(r["tokens"] for r in results["rows"] if r["row"] == "untrained")

    def names(self) -> list[str]:
        there = {name for name, _, _ in self._rows}
        return [name for name in LABELS if name in there]

    def counts(self, name: str) -> list[int]:
        return sorted({tokens for row, tokens, _ in self._rows if row == name})

    def facts(self, name: str, tokens: int) -> dict:
        return self._rows[name, tokens, self.seeds[0]]

    def accuracy(self, name: str, tokens: int, kind: str | None = None) -> list[float]:
        """Accuracy for each seed: for one kind of question, or the mean over all kinds."""
        return [self._accuracy(name, tokens, seed, kind) for seed in self.seeds]

    def retention(self, name: str, tokens: int, kind: str | None = None) -> list[float]:
        """``(x - lower) / (upper - lower)`` for each seed, where x is the mean over all kinds.

        (The paper, section 4.2, averages such ratios over benchmarks; here, a kind with bounds close
        together would dominate that.) The lower bound is the one with the fewest tokens, for all rows.
        NaN where the bounds are equal.
        """
        found = []
        for seed in self.seeds:
            upper = self._accuracy("full", self._full, seed, kind)
            lower = self._accuracy("untrained", self._least, seed, kind)
            kept = self._accuracy(name, tokens, seed, kind) - lower
            found.append(kept / (upper - lower) if upper != lower else math.nan)
        return found

    def share(self, name: str, tokens: int) -> list[float]:
        """``x / upper`` for each seed (the supplement's Table 4)."""
        upper = self.accuracy("full", self._full)
        pairs = zip(self.accuracy(name, tokens), upper, strict=True)
        return [x / u if u else math.nan for x, u in pairs]

    def _accuracy(self, name: str, tokens: int, seed: int, kind: str | None) -> float:
        by_kind = self._rows[name, tokens, seed]["accuracy"]
        return mean(by_kind.values()) if kind is None else by_kind[kind]


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over the seeds; NaN for the latter with one seed."""
    values = np.array(list(values))
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan
