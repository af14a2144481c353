"""Retention, share of the upper bound, and the table of our scores with the paper's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from voco_model.evaluate.benchmarks import BENCHMARKS
from voco_model.evaluate.paper import COLUMNS, reported

BOUNDS = ("full", "untrained")  # upper and lower

_Scores = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One method's scores.

    Attributes:
        method: a key of ``voco_model.baselines.METHODS``.
        label: the method's name in the table.
        tokens: tokens per image; None where that depends on the image.
        scores: scores by benchmark, in the paper's units; see ``benchmarks.scores_of``.
    """

    method: str
    label: str
    tokens: int | None
    scores: _Scores


def retention(scores: _Scores, upper: _Scores, lower: _Scores, over: Sequence[str]) -> float | None:
    """How much of the gap between the bounds compression retains, in percent (section 4.2).

    The mean over benchmarks of ``(score - lower) / (upper - lower)``.

    Args:
        upper: scores of the model that reads all vision tokens.
        lower: scores under the mask of a model that was never trained to compress.
        over: benchmarks to average over.

    Returns:
        None where a score is missing or a benchmark's two bounds are equal.
    """
    if not over or any(name not in row for row in (scores, upper, lower) for name in over):
        return None
    if any(upper[name] == lower[name] for name in over):
        return None
    kept = [(scores[name] - lower[name]) / (upper[name] - lower[name]) for name in over]
    return 100 * sum(kept) / len(kept)


def share(scores: _Scores, upper: _Scores, over: Sequence[str]) -> float | None:
    """The mean over benchmarks of ``score / upper`` (the supplement's Table 4), in percent.

    It has no lower bound, so it is higher than the retention of the same scores.

    Returns:
        None where a score is missing or an upper bound is 0.
    """
    if not over or any(not upper.get(name) or name not in scores for name in over):
        return None
    return 100 * sum(scores[name] / upper[name] for name in over) / len(over)


def columns_of(paper_model: str | None, rows: Iterable[Row]) -> tuple[str, ...]:
    """Benchmarks with a score in any row, in the paper's order.

    The paper reports SEED over all questions or over images alone, depending on the model; other models
    get all questions.
    """
    known = COLUMNS.get(paper_model, (*COLUMNS["LLaVA-1.5-7B"], "TextVQA"))
    measured = {name for row in rows for name in row.scores}
    return tuple(name for name in known if name in measured)


def table(rows: Sequence[Row], paper_model: str | None = None) -> str:
    """A Markdown table: bounds first and last, each row followed by the paper's, where it has one.

    All averages, also the paper's, are over the benchmarks shown; a row that lacks one of these has no
    average. (The paper's rows without scores have their printed average, if all of the paper's
    benchmarks are shown.) Other tasks' metrics follow, and are in no average.

    Args:
        paper_model: a key of ``paper.COLUMNS``; None for a model that the paper doesn't have.
    """
    columns = columns_of(paper_model, rows)
    others = tuple(
        dict.fromkeys(name for row in rows for name in row.scores if name not in BENCHMARKS)
    )
    heads = ("method", "tokens", *columns, *others, "retention %", "share of upper %")
    ours = {row.method: row.scores for row in rows if row.method in BOUNDS}
    theirs = {
        method: row.scores
        for method in BOUNDS
        if (row := reported(paper_model, method)) is not None
    }
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for row in sorted(rows, key=lambda row: (_place(row.method), row.method, -(row.tokens or 0))):
        lines.append(
            (
                row.label,
                "by image" if row.tokens is None else str(row.tokens),
                *(_number(name, row.scores.get(name)) for name in (*columns, *others)),
                *_averages(row.scores, ours, columns),
            )
        )
        found = reported(paper_model, row.method, row.tokens)
        if found is None:
            continue
        averages = _averages(found.scores, theirs, columns)
        if not found.scores and found.retention and set(columns) == set(COLUMNS[paper_model]):
            averages = (f"{found.retention:.1f}", "-")
        lines.append(
            (
                f"paper's ({found.source})",
                str(found.tokens),
                *(_number(name, found.scores.get(name)) for name in columns),
                *["-"] * len(others),
                *averages,
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _averages(
    scores: _Scores, bounds: Mapping[str, _Scores], columns: Sequence[str]
) -> tuple[str, str]:
    upper, lower = bounds.get("full", {}), bounds.get("untrained", {})
    values = retention(scores, upper, lower, columns), share(scores, upper, columns)
    return tuple("-" if value is None else f"{value:.1f}" for value in values)


def _place(method: str) -> int:
    return {"full": 0, "untrained": 2}.get(method, 1)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name in BENCHMARKS else f"{value:.4g}"
