"""The report of a run: Markdown tables and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from voco_model.miniature.exam import PRICED
from voco_model.miniature.results import LABELS, Rows, spread

_PERCENT = 100


TABLES = ("main", "retention", "share", "kinds", "cost", "made")


def tables(results: dict) -> dict[str, str]:
    """The Markdown tables by name, one for each of ``TABLES``."""
    rows = Rows(results)
    return {
        "main": _by_count(rows, "accuracy, %", rows.accuracy),
        "retention": _by_count(rows, "retention (x - lower) / (upper - lower), %", rows.retention),
        "share": _by_count(rows, "share x / upper, %", rows.share),
        "kinds": _kinds(rows),
        "cost": _cost(rows),
        "made": _made(results),
    }


def save(results: dict, output: Path) -> None:
    """Write ``results.json``, ``tables.md`` and ``retention.png``."""
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "tables.md").write_text("\n\n".join(tables(results).values()) + "\n")
    plot(results, output / "retention.png")


def _by_count(rows: Rows, title: str, numbers) -> str:
    """A row per method, a column per number of tokens: mean and standard deviation over seeds."""
    counts = sorted(
        {count for name in rows.names() if name != "full" for count in rows.counts(name)}
    )
    lines = []
    for name in rows.names():
        if name == "full":
            cells = [_percent(numbers(name, rows.counts(name)[0]))] + [""] * (len(counts) - 1)
            label = f"{LABELS[name]}: {rows.counts(name)[0]} tokens"
        else:
            there = rows.counts(name)
            cells = [_percent(numbers(name, count)) if count in there else "" for count in counts]
            label = LABELS[name]
        lines.append([label, *cells])
    return f"**{title}**\n\n" + _markdown(["tokens a picture", *map(str, counts)], lines)


def _kinds(rows: Rows) -> str:
    """Accuracy by kind of question."""
    lines = []
    for name in rows.names():
        for count in rows.counts(name):
            cells = [_percent(rows.accuracy(name, count, kind)) for kind in rows.kinds]
            lines.append([LABELS[name], str(count), *cells])
    guesser = [f"{_PERCENT * rows.without_places[kind]:.1f}" for kind in rows.kinds]
    lines.append(["*Who knows what is there, but not where*", "", *guesser])
    return "**accuracy by kind of question, %**\n\n" + _markdown(["", "tokens", *rows.kinds], lines)


def _cost(rows: Rows) -> str:
    lines = []
    for name in rows.names():
        if name in ("voco drawn", "voco distinct", "qformer long", "untrained"):
            continue  # as their neighbours
        for count in rows.counts(name):
            facts = rows.facts(name, count)
            lines.append(
                [
                    LABELS[name],
                    str(count),
                    f"{facts['cache_bytes'] / 1e3:.1f}",
                    f"{facts['flops_first'] / 1e6:.1f}",
                    f"{facts['flops_again'] / 1e6:.1f}",
                ]
            )
    head = ["", "tokens", "cache of a picture, kB", "MFLOP, first question", "MFLOP, another"]
    title = f'**what a picture and "{PRICED}" cost the language model**'
    return f"{title}\n\n" + _markdown(head, lines)


def _made(results: dict) -> str:
    recipe, machine = results["recipe"], results["machine"]
    seeds = (
        "one seed"
        if recipe["seeds"] == 1
        else f"{recipe['seeds']} seeds, mean ± standard deviation over them"
    )
    shape = recipe["shape"]
    return (
        f"Made on {machine['device']}, {results['seconds'] / 60:.0f} minutes of one process in all; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {results['date']}. "
        f"{shape['layers']} layers, {shape['hidden']} wide; {seeds}; {recipe['tune_steps']} steps of "
        f"{recipe['batch']} pictures for every tuned row; {recipe['pictures']} held-out pictures, "
        f"{len(results['rows'][0]['accuracy'])} questions each."
    )


def _percent(values: Sequence[float]) -> str:
    middle, deviation = spread(values)
    if math.isnan(middle):
        return "-"  # a bound is 0, or both are the same
    if len(values) == 1:
        return f"{_PERCENT * middle:.1f}"
    return f"{_PERCENT * middle:.1f} ± {_PERCENT * deviation:.1f}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def plot(results: dict, path: str | PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Plot retention over the number of tokens: a line per method, error bars of a standard deviation.

    Args:
        metadata: text entries for the PNG.
    """
    from matplotlib.figure import Figure

    rows = Rows(results)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in rows.names():
        if name in ("full", "untrained"):
            continue
        counts = rows.counts(name)
        points = [spread(rows.retention(name, count)) for count in counts]
        axes.errorbar(
            counts,
            [_PERCENT * middle for middle, _ in points],
            [_PERCENT * deviation for _, deviation in points],
            label=LABELS[name],
            marker="o",
            capsize=3,
            linewidth=2.5 if name == "voco" else 1.2,
        )
    counts = rows.counts("untrained")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.axhline(_PERCENT, color="gray", linewidth=0.8)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("tokens a picture")
    axes.set_ylabel("retention, %")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150, metadata=metadata)
