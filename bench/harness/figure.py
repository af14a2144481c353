"""What the plots of all records share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("#c0392b", "#e08e79", "#f0c4b8")
"""Colours of what is ours."""


def panels(count: int, *, columns: int, height: float, **options) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels in so many columns, each ``height`` inches high.

    Args:
        options: for matplotlib's ``subplots``.

    Returns:
        the figure; its panels, a list of axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(12, 1 + height * rows),
        squeeze=False,
        layout="constrained",
        **options,
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def legend(
    figure: Figure, handles: Iterable[Artist], labels: Iterable[str], title: str | None = None
) -> None:
    """The figure's legend, to the right of its panels."""
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title=title,
    )


def labelled(axes: Iterable[Axes]) -> dict[str, Artist]:
    """The labelled artists of all panels, by label."""
    found = {}
    for axis in axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    return found


def save(
    figure: Figure, record: dict, what: str, path: Path, metadata: dict[str, str] | None
) -> None:
    """Write the PNG, under a title that says where its figures come from, and close the figure.

    Args:
        what: of the title, between device and versions.
    """
    from matplotlib import pyplot

    environment = record["environment"]
    figure.suptitle(
        f"{environment['device']['name']}, {what}; torch {environment['versions']['torch']}, "
        f"{environment['commit'][:12]}, {environment['date'][:10]}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)
